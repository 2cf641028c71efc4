"""Checkpoints on a bucket: a whole one is there or none.

BUCKET/step-00001200.json                         state.json, and name, size and SHA-256 of each file; written last
BUCKET/step-00001200-0d5f.../model.safetensors    named by that alone: what no state names is swept when it is old
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from obstore.exceptions import BaseError
from safetensors import SafetensorError

from microdit.model.checkpoint import CheckpointError
from microdit.model.loading import STEP_FOLDER
from microdit.pipeline.base.errors import first_line
from microdit.pipeline.storage.bucket import SCHEMES
from microdit.pipeline.storage.store import Store, open_store
from microdit.pipeline.storage.uploads import old_uploads
from microdit.trainer.checkpoints.contents import (
    OPTIMIZER,
    Checkpoint,
    Snapshot,
    check_version,
    folder_name,
    read,
    state_text,
)

OLD = timedelta(hours=6)  # what no state names by then is a killed process's, or of a write that failed
RANGE = 32 << 20  # bytes of one request for a part of a file
READERS = 8  # requests at once
UNREADABLE = (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError)  # what a damaged state raises
HASHED = re.compile(r"[0-9a-f]{64}")
ATTEMPT = re.compile(r"(step-\d+)-[0-9a-f]{16}/[^/]+")


class Bucket:
    """Checkpoints on a bucket. scratch: a folder of this machine for what is read; a file to upload is written first
    into the machine's temporary folder (TMPDIR)."""

    def __init__(self, store: Store, scratch: Path):
        self.store, self.scratch = store, scratch

    def __str__(self) -> str:
        return self.store.url

    def names(self) -> list[str]:
        with _plain_errors():
            found = [name.removesuffix(".json") for name in self.store.names() if name.endswith(".json")]
        return sorted((name for name in found if STEP_FOLDER.fullmatch(name)), key=_step, reverse=True)

    def state(self, name: str) -> dict[str, Any]:
        with _plain_errors():
            return dict(json.loads(self.store.get(f"{name}.json")))

    def read(self, name: str) -> Checkpoint:
        state = self.state(name)
        check_version(state)
        folder = self.scratch / f"{name}.download"
        try:
            self.download(state, folder)
            return read(folder, f"{self}/{name}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # the tensors are mapped, and need no name

    def write(self, step: int, tensors: Snapshot, state: Mapping[str, Any], generate: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step. A kill, or a bucket that fails for minutes, leaves those before.

        Raises:
            OSError: it cannot be written.
        """
        attempt = f"{folder_name(step)}-{secrets.token_hex(8)}"

        def upload(name: str) -> dict[str, Any]:
            with self.store.scratch(f"{attempt}/{name}") as path:
                tensors.write(name, path)
                about = _about(path)
                self.store.publish({f"{attempt}/{name}": path})
            return {"object": f"{attempt}/{name}"} | about

        try:
            with _plain_errors(), ThreadPoolExecutor(len(tensors.files)) as pool:
                files = dict(zip(tensors.files, pool.map(upload, tensors.files), strict=True))
                data = json.dumps(generate, indent=1).encode()
                self.store.create(f"{attempt}/generate.json", data)
                digest = hashlib.sha256(data).hexdigest()
                files["generate.json"] = {
                    "object": f"{attempt}/generate.json", "size": len(data), "sha256": digest,
                }  # fmt: skip
                if self.store.exists(f"{folder_name(step)}.json"):  # of a run that went back to an older one
                    self.remove(folder_name(step))
                text = state_text(step, {**state, "files": files})
                self.store.create(f"{folder_name(step)}.json", text.encode())
        except FileExistsError as error:
            raise OSError(f"{self}/{folder_name(step)}: another run has just written it") from error
        except SafetensorError as error:
            raise OSError(str(error)) from error

    def remove(self, name: str) -> None:
        try:
            objects = self._objects(name)
        except UNREADABLE:
            objects = []  # what it named is swept when it is old
        with _plain_errors():
            self.store.delete([f"{name}.json"])  # first, so that no state names what is gone
            self.store.delete([o for o in objects if ATTEMPT.fullmatch(o)])

    def sweep(self) -> None:
        """Remove what killed processes left. Raises OSError, RequestError."""
        limit = datetime.now(UTC) - OLD
        with _plain_errors():
            old = [item.name for item in self.store.list() if item.modified <= limit]
            stray = [name for name in old if ATTEMPT.fullmatch(name)]
            named: set[str] = set()
            for name in self.names() if stray else ():  # after the listing: what was written meanwhile is among them
                try:
                    named.update(self._objects(name))
                except UNREADABLE:  # all that may be its own stays
                    named.update(one for one in stray if one.startswith(f"{name}-"))
            self.store.delete([name for name in stray if name not in named])
        for client, arguments in old_uploads(self.store.url, limit):
            client.abort_multipart_upload(**arguments)

    def _objects(self, name: str) -> list[str]:
        return [file["object"] for file in self.state(name)["files"].values()]

    def download(self, state: Mapping[str, Any], folder: Path, without: str | None = None) -> None:
        """The files of a checkpoint, whole, into a folder that is not there yet.

        Raises:
            CheckpointError: a file is not what was written, or `state` does not tell.
            OSError: it cannot be read.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, file in state["files"].items():
            if name == without:
                continue
            if Path(name).name != name or not ATTEMPT.fullmatch(file["object"]) or not HASHED.fullmatch(file["sha256"]):
                raise CheckpointError(f"file {name!r}: object or SHA-256 are of no known form")
            with _plain_errors():
                _download(self.store, file["object"], int(file["size"]), folder / name)
            found = _about(folder / name)
            if found != {"size": file["size"], "sha256": file["sha256"]}:
                raise CheckpointError(f"{self}/{file['object']} is damaged: SHA-256 {found['sha256']}, expected {file}")
        (folder / "state.json").write_text(json.dumps(state, indent=1))


def on_this_machine(checkpoint: str | Path) -> Path:
    """Where to open what a bucket's address names, a run's newest checkpoint or one of them (BUCKET/step-00001200).

    Its files, without AdamW's state, are kept in the cache, `microdit/checkpoints` in $XDG_CACHE_HOME or ~/.cache. What
    is no such address is a path already.

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
            bucket = Bucket(open_store(root), cache)
        else:
            bucket = Bucket(open_store(url), cache)
            name = next(iter(bucket.names()), "")
        if not name:
            raise CheckpointError("there is no checkpoint")
        state = bucket.state(name)
        check_version(state)
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


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _about(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _download(store: Store, name: str, size: int, path: Path) -> None:
    """An object as a file, in parts: READERS x RANGE bytes of memory at most."""
    with path.open("wb") as file, ThreadPoolExecutor(READERS) as pool:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now

        def part(start: int) -> None:
            os.pwrite(file.fileno(), store.get_range(name, start, min(RANGE, size - start)), start)

        list(pool.map(part, range(0, size, RANGE)))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a bucket refuses for good is an OSError to those outside."""
    try:
        yield
    except BaseError as error:
        raise OSError(first_line(error)) from error
