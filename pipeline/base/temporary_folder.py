"""Temporary folders that are removed even after a kill: by the next process that makes one."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "lock"
UNLOCKED = 3600.0  # seconds after which a folder without a lock file is left over; it gets one as soon as it is made


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder for the duration of the block, and remove those with the same prefix whose processes have died.

    Args:
        parent: where it lies; by default the system's folder of temporary files.
    """
    _sweep(parent or Path(tempfile.gettempdir()), prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with (folder / LOCK).open("w") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove this user's folders whose lock nobody holds."""
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):  # another process was faster
            about = folder.lstat()
            if about.st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink() and _is_left(folder):
                shutil.rmtree(folder)


def _is_left(folder: Path) -> bool:
    try:
        file = (folder / LOCK).open("r+")
    except FileNotFoundError:
        return time.time() - folder.stat().st_mtime > UNLOCKED
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
