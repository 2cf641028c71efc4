"""The folder of this machine for downloads, and for what is sorted on the disk."""

import os
import stat
import tempfile
from pathlib import Path

from microdit.pipeline.base.errors import RequestError

ADVICE = "set resources.scratch to a folder of your own"


def scratch_folder(given: str | None) -> Path:
    """Return the folder of downloads: `resources.scratch`, or the default."""
    return Path(given).expanduser() if given else Path(tempfile.gettempdir()) / f"microdit-{os.getuid()}"


def make_scratch(scratch: Path) -> None:
    """Make the scratch folder.

    The default one lies where everybody may write, under a name that everybody can tell: another user may have made it
    beforehand, to read or to exchange what is put there.

    Raises:
        RequestError: it cannot be made or written, or is, by default, open to others.
    """
    try:
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = scratch.lstat()
    except OSError as error:
        reason = f"it is no folder, or cannot be made ({error.strerror})"
        raise RequestError(f"scratch folder {scratch}: {reason}; {ADVICE}") from error
    if scratch == scratch_folder(None):
        wrong = None
        if not stat.S_ISDIR(found.st_mode):
            wrong = "it is a link"
        elif found.st_uid != os.getuid():
            wrong = f"it belongs to another user (number {found.st_uid}, you are {os.getuid()})"
        elif found.st_mode & 0o022:
            wrong = f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o}, expected 0700)"
        if wrong is not None:
            raise RequestError(f"scratch folder {scratch}: {wrong}; remove it, or {ADVICE}")
    if not os.access(scratch, os.W_OK | os.X_OK):
        raise RequestError(f"scratch folder {scratch}: it cannot be written; {ADVICE}")
