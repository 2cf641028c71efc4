"""Checkpoints on a bucket: a whole one is there or none.

BUCKET/step-00001200.json                         state.json, and name, size and SHA-256 of each file; written last
BUCKET/step-00001200-0d5f.../model.safetensors    named by that alone: what no state names is swept when it is old
"""

import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from microdit.model.checkpoint import CheckpointError
from microdit.model.loading import STEP_FOLDER
from microdit.pipeline.storage import ranges
from microdit.pipeline.storage.bucket_lock import BucketLock
from microdit.pipeline.storage.plain_errors import plain_errors
from microdit.pipeline.storage.store import Store
from microdit.pipeline.storage.uploads import old_uploads
from microdit.trainer.checkpoints import contents
from microdit.trainer.checkpoints.contents import Checkpoint, TensorSnapshot, folder_name

OLD = timedelta(hours=6)  # what no state names by then is a killed process's, or of a write that failed
UNREADABLE = (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError)  # what a damaged state raises
HASHED = re.compile(r"[0-9a-f]{64}")
ATTEMPT = re.compile(r"(step-\d+)-[0-9a-f]{16}/[^/]+")


class BucketCheckpoints:
    """Checkpoints on a bucket. scratch: a folder for what is read; what is to be uploaded goes through TMPDIR."""

    def __init__(self, store: Store, scratch: Path):
        self.store, self.scratch, self._lock = store, scratch, BucketLock(store, "run")

    def locked(self, say: Callable[[str], None]) -> BucketLock:
        """Keep other runs out while the block runs."""
        self._lock.say = say
        return self._lock

    def __str__(self) -> str:
        return self.store.url

    @plain_errors()
    def names(self) -> list[str]:
        """List the checkpoints, the newest first."""
        names = [name.removesuffix(".json") for name in self.store.names() if name.endswith(".json")]
        steps = [name for name in names if STEP_FOLDER.fullmatch(name)]
        return sorted(steps, key=lambda name: int(name.removeprefix("step-")), reverse=True)

    @plain_errors()
    def state(self, name: str) -> dict[str, Any]:
        return contents.parse_state(bytes(self.store.get(f"{name}.json")))

    def read(self, name: str) -> Checkpoint:
        state = self.state(name)
        folder = self.scratch / f"{name}.download"
        try:
            self.download(state, folder)
            return contents.read(folder, state, f"{self}/{name}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # the tensors are mapped, and need no name

    @plain_errors()
    def write(self, step: int, tensors: TensorSnapshot, state: Mapping[str, Any], generate: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step. A kill, or a bucket that fails for minutes, leaves those before.

        Raises:
            OSError: it cannot be written.
        """
        name, names = folder_name(step), contents.file_names(tensors)
        attempt = f"{name}-{secrets.token_hex(8)}"

        def upload(file: str) -> dict[str, Any]:
            with self.store.scratch(f"{attempt}/{file}") as path:
                contents.write_file(path, file, tensors, generate)
                entry = {"object": f"{attempt}/{file}", **contents.listed(path)}
                self.store.publish({f"{attempt}/{file}": path})
            return entry

        with ThreadPoolExecutor(len(names)) as pool:
            files = dict(zip(names, pool.map(upload, names), strict=True))
        self._lock.check()
        if self.store.exists(f"{name}.json"):  # of a run that went back to an older one
            self.remove(name)
        try:
            self.store.create(f"{name}.json", contents.state_text(step, state, files).encode())
        except FileExistsError as error:
            raise OSError(f"{self}/{name}: another run has just written it") from error

    @plain_errors()
    def remove(self, name: str) -> None:
        try:
            objects = self._objects(name)
        except UNREADABLE:
            objects = []  # what it named is swept when it is old
        self.store.delete([f"{name}.json"])  # first, so that no state names what is gone
        self.store.delete([o for o in objects if ATTEMPT.fullmatch(o)])

    @plain_errors()
    def sweep(self) -> None:
        """Remove what killed processes left. Raises OSError, RequestError."""
        limit = datetime.now(UTC) - OLD
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

    @plain_errors()
    def download(self, state: Mapping[str, Any], folder: Path, without: str | None = None) -> None:
        """Write the files of a checkpoint, whole, into a new folder.

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
            ranges.download(self.store, file["object"], int(file["size"]), folder / name)
            contents.check_file(folder / name, file, f"{self}/{file['object']}")
        (folder / "state.json").write_text(json.dumps(state, indent=1))
