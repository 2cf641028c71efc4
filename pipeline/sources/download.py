"""A whole file on this machine's disk, for as long as it is read."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.sources.remote import RemoteFile


def scratch_folder(given: str | None) -> Path:
    """Where downloads lie while they are under way and read: `resources.scratch`, or the default."""
    return Path(given).expanduser() if given else Path(tempfile.gettempdir()) / f"microdit-{os.getuid()}"


@contextmanager
def local_copy(file: RemoteFile, scratch: Path) -> Iterator[Path]:
    """The file as a path on this machine: itself if it is local."""
    if "://" in file.url:
        raise NotImplementedError(file.url)
    yield Path(file.url)
