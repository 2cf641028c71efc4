"""Copies of objects on a bucket in a folder of this machine: bounded, shared by its processes, lost without harm."""

import fcntl
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from microdit.pipeline.corpus.records import ObjectRef

FOLDER = "microdit-objects"  # below the folder that is given; nothing outside of it is ever touched
OWN = re.compile(r"[0-9a-f]{64}(#\d+)?")  # a copy is named by its bytes' hash; `#...` is one that is being written
OLD = 3600.0  # seconds after which an unfinished copy is a killed process's


class DiskCache:
    """At most `max_bytes` of copies, those that were used last. A folder that cannot be written makes none."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder / FOLDER, max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, ref: ObjectRef) -> FileIO | None:
        """Open the copy of an object, if there is one of its size; who finds it damaged calls `drop`.

        It can be read on when it has made room for others meanwhile.
        """
        path = self.folder / ref.sha256
        try:
            file = path.open("rb", buffering=0)
            if os.fstat(file.fileno()).st_size == ref.size:
                os.utime(path)
                return file
            self.drop(ref)
        except OSError:  # none, or another process has just removed it: the bucket has it
            pass
        return None

    def put(self, ref: ObjectRef, data: bytes | memoryview) -> None:
        """Keep a copy, after those used longest ago have made room for it; it appears at once or not at all."""
        path = self.folder / ref.sha256
        partial = path.with_name(f"{path.name}#{random.SystemRandom().randrange(10**12)}")
        try:
            with self._locked():
                if path.exists() or not self._make_room(len(data)):
                    return
                with partial.open("wb") as file:  # its size counts from now on
                    os.posix_fallocate(file.fileno(), 0, max(len(data), 1))
            with partial.open("r+b") as file:
                file.write(data)
            with self._locked():  # else who is counting may see neither name
                partial.rename(path)
        except OSError:  # a full disk, for one: the run needs no copy
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def drop(self, ref: ObjectRef) -> None:
        with suppress(OSError):
            (self.folder / ref.sha256).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> bool:
        if size > self.max_bytes:
            return False
        copies = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if OWN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        about = entry.stat(follow_symlinks=False)
                        copies.append((about.st_mtime, about.st_size, Path(entry.path)))
        total = sum(copy[1] for copy in copies)
        now = time.time()
        for used, taken, path in sorted(copies):
            unfinished = "#" in path.name
            if (unfinished and now - used > OLD) or (not unfinished and total + size > self.max_bytes):
                path.unlink(missing_ok=True)
                total -= taken
        return total + size <= self.max_bytes
