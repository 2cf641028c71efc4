"""One writer for a folder at a time."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from microdit.pipeline.base.errors import RequestError


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold FOLDER/lock for the duration of the block; the kernel lets go of it when the process dies.

    what: who holds it, for the message to others, such as "run".

    Raises:
        RequestError: another process holds it, or there is no room for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RequestError(
                f"another {what} works in {folder} ({file.read(200).strip() or 'which just began'}): "
                "wait for its end, stop it, or take another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            file.truncate(0)
            file.write(
                f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n"
            )
            file.flush()
        except OSError:  # a full disk; the lock is held all the same
            pass
        yield
