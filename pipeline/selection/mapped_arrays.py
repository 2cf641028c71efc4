"""Arrays in a folder of this machine, made once and mapped by every process that needs them.

FOLDER/<key>/ has an `.npy` file for each array, and `manifest.json`: the SHA-256 of what follows, and then the JSON of
what the arrays are about and of their files' hashes. It appears whole, by a rename, or not at all.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from microdit.pipeline.base.digest import sha256_file
from microdit.pipeline.base.errors import RequestError

MOST_BYTES = 20 * 10**9  # of all that a folder keeps; what was used longest ago goes
MOST_SECONDS = 3600.0  # to wait for the process that makes the same
OLD = 24 * 3600.0  # seconds after which an unfinished folder is a killed process's
MANIFEST = "manifest.json"

Arrays = dict[str, np.ndarray]
Made = tuple[Any, Arrays]  # what JSON can say, and arrays by name


def private_folder(name: str) -> Path:
    """Return the folder of this user for temporary files of this name, which nobody else can write."""
    return Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"


def open_or_make(folder: Path, key: str, make: Callable[[], Made]) -> Made:
    """Map what is kept under a key, after it was made if it is not there or damaged: by one process at a time.

    A process that dies while it makes it lets the next one do so.

    Raises:
        RequestError: the folder cannot be used, or another process has been at work on it for an hour; and what `make`
            raises.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        if (kept := load(folder / key)) is not None:
            return kept
        with _locked(folder):
            if (kept := load(folder / key)) is None:
                about, arrays = make()
                save(folder / key, about, arrays)
                _tidy(folder, key)
                kept = load(folder / key)
    except OSError as error:
        raise RequestError(
            f"{folder}: the index of the samples cannot be kept there for the processes of this machine ({error}); "
            "make room, or give cache_folder, or TMPDIR, another folder"
        ) from error
    if kept is None:
        raise RequestError(f"{folder / key}: what was just written there is damaged; check the disk")
    return kept


def save(folder: Path, about: Any, arrays: Arrays) -> None:
    """Write arrays as a folder; one that is there makes room."""
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}#", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        files = {name: sha256_file(partial / f"{name}.npy") for name in arrays}
        text = json.dumps({"about": about, "files": files}).encode()
        (partial / MANIFEST).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path) -> Made | None:
    """Map what `save` wrote, read-only, after its bytes were checked; None if it is not there or damaged."""
    try:
        digest, _, text = (folder / MANIFEST).read_bytes().partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            return None
        manifest = json.loads(text)
        if any(sha256_file(folder / f"{name}.npy") != sha256 for name, sha256 in manifest["files"].items()):
            return None
        # as plain arrays: slices of a memmap are slow
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in manifest["files"]}
        os.utime(folder)
        return manifest["about"], arrays
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which the kernel lets go of when the process dies."""
    deadline = time.monotonic() + MOST_SECONDS
    with (folder / "lock").open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise RequestError(
                        f"{folder}: process {file.read(20).strip()} has been making an index of samples for "
                        f"{MOST_SECONDS / 60:.0f} minutes; stop it, or give another cache_folder"
                    ) from None
                time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _tidy(folder: Path, key: str) -> None:
    """Remove what was used longest ago until the rest fits, and what killed processes left. Mapped files stay so."""
    total, now = 0, time.time()
    kept = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: -path.stat().st_mtime)
    for path in sorted(kept, key=lambda path: path.name != key):
        with suppress(FileNotFoundError):
            total += sum(file.stat().st_size for file in path.iterdir())
            unfinished = "#" in path.name and now - path.stat().st_mtime > OLD
            if path.name != key and (unfinished or total > MOST_BYTES):
                shutil.rmtree(path, ignore_errors=True)
