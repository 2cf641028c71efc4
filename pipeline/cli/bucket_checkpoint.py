"""Checkpoints of a run on a bucket, opened by address."""

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from microdit.model.checkpoint import CheckpointError
from microdit.model.loading import STEP_FOLDER
from microdit.pipeline.storage.bucket import SCHEMES
from microdit.pipeline.storage.store import open_store
from microdit.trainer.checkpoints.bucket import BucketCheckpoints
from microdit.trainer.checkpoints.contents import OPTIMIZER


def on_this_machine(checkpoint: str | Path) -> Path:
    """Download the checkpoint that a bucket's address names: a run's newest, or one of them (BUCKET/step-00001200).

    Its files, without AdamW's state, are kept in the cache, `microdit/checkpoints` in $XDG_CACHE_HOME or ~/.cache. What
    is no such address is a path already, and is returned.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    url = str(checkpoint).rstrip("/").removesuffix(".json")
    if urlsplit(url).scheme not in SCHEMES:
        return Path(checkpoint)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microdit" / "checkpoints"
    root, _, name = url.rpartition("/")
    try:
        if STEP_FOLDER.fullmatch(name):
            bucket = BucketCheckpoints(open_store(root), cache)
        else:
            bucket = BucketCheckpoints(open_store(url), cache)
            name = next(iter(bucket.names()), "")
        if not name:
            raise CheckpointError("there is no checkpoint")
        state = bucket.state(name)
        # equal states name equal files
        key = hashlib.sha256(json.dumps([bucket.store.url, state], sort_keys=True).encode()).hexdigest()[:16]
        folder = cache / key / name
        if not folder.exists():
            partial = folder.with_name(f"{name}.{secrets.token_hex(4)}.partial")
            bucket.download(state, partial, without=OPTIMIZER)
            try:
                partial.rename(folder)
            except OSError:  # another process has made it meanwhile
                shutil.rmtree(partial)
        return folder
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{url}: {error}") from error
