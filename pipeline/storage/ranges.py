"""Large objects downloaded in parts."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from microdit.pipeline.storage.store import Store

RANGE = 32 << 20  # bytes of one request for a part of an object
READERS = 8  # requests at once


def download(store: Store, name: str, size: int, path: Path) -> None:
    """Write an object of `size` bytes as a file, in parts: READERS x RANGE bytes of memory at most.

    Raises:
        FileNotFoundError: there is none.
        OSError: the disk is full, or the store fails.
    """
    with path.open("wb") as file, ThreadPoolExecutor(READERS) as pool:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now

        def part(start: int) -> None:
            os.pwrite(file.fileno(), store.get_range(name, start, min(RANGE, size - start)), start)

        list(pool.map(part, range(0, size, RANGE)))
