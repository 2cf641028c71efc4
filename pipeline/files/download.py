"""Download a file to this machine's disk for as long as it is read.

In the scratch folder a download is `<name>.part` until it is complete; `<name>.about` holds its version as the server
stated it, and `<name>.lock` is locked by the processes that download or read it. The next process resumes what a killed
one leaves there.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from io import FileIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.retry import Backoff
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.files.scratch import make_scratch
from microdit.pipeline.files.transfer import ChangedError, TransientError, Version, shown, transfer

PREFIX = "microdit-"
OLD = 48 * 3600.0  # seconds after which a leftover is swept
TRIES = 8  # in a row without progress, before a download is given up
PROGRESS = 64 << 10  # bytes
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before the second try, twice as many before each further one
LONGEST_WAIT = 900.0  # seconds that a server may ask for
SLOW_SECONDS, SLOW_BYTES = 60.0, 60 << 10  # a connection that brings less in that time is replaced
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
POLL = 0.2  # seconds between two attempts to lock
BLOCK = 4 << 20


@contextmanager
def local_copy(file: RemoteFile, scratch: Path) -> Iterator[Path]:
    """Yield a local path of the file: its own if it is local, else that of a copy in `scratch`.

    A copy is removed when the block ends without an exception, and kept (or the part of it) when it ends with one, so
    that the next try resumes it. Processes that read the same file share one copy. A download is retried as long as it
    makes progress, through cut, silent and slow connections, 429 (as late as the server says) and 5xx; its size and,
    where it is known, its sha256 are checked.

    Raises:
        RequestError: the server refuses (401, 403): a gated repository, an expired link.
        OSError: no such file, no progress, or (ENOSPC) the scratch disk is full.
    """
    if "://" not in file.url:
        yield Path(file.url)
        return
    scratch = scratch.absolute()
    make_scratch(scratch)
    _sweep(scratch)
    path = scratch / _scratch_name(file)
    descriptor = _claim(file, path)
    try:
        yield path
        if _flock(descriptor, fcntl.LOCK_EX) and _same(descriptor, path):  # nobody else reads it
            _remove(path)
    finally:
        os.close(descriptor)


# -- scratch ---------------------------------------------------------------------------------------------------------
def _scratch_name(file: RemoteFile) -> str:
    """Name the copy by what identifies the file, not by the URL's host and query: mirrors and signatures change."""
    parts = urlsplit(file.url)
    address = file.url if parts.scheme not in ("http", "https") else parts.path
    digest = hashlib.sha256("\0".join([file.name, address, file.etag, str(file.size)]).encode("utf-8", "replace"))
    end = re.sub(r"[^A-Za-z0-9_.-]", "_", unquote(file.name).rpartition("/")[2])[-80:]
    end = re.sub(r"\.(part|about|lock)$", r"_\1", end)  # these are ours
    return f"{PREFIX}{digest.hexdigest()[:24]}-{end}"


@cache
def _sweep(scratch: Path) -> None:
    """Remove old copies that no process holds, once a process. Other files of the folder are left alone."""
    for path in {_copy_of(each) for each in scratch.iterdir() if re.match(PREFIX + "[0-9a-f]{24}-", each.name)}:
        with suppress(OSError):  # another process was faster
            if time.time() - max(each.stat().st_mtime for each in _all(path) if each.exists()) > OLD:
                descriptor = _open_lock(path)
                try:
                    if _flock(descriptor, fcntl.LOCK_EX):
                        _remove(path)
                finally:
                    os.close(descriptor)


def _copy_of(path: Path) -> Path:
    """Return the path of the copy that a file of the scratch folder belongs to."""
    return path.with_suffix("") if path.suffix in (".part", ".about", ".lock") else path


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def _all(path: Path) -> list[Path]:
    return [path, *(_beside(path, what) for what in ("part", "about", "lock"))]


def _remove(path: Path) -> None:
    """Remove a copy and its files, the lock last; for the holder of the lock."""
    for each in _all(path):
        each.unlink(missing_ok=True)


# -- locks -----------------------------------------------------------------------------------------------------------
def _claim(file: RemoteFile, path: Path) -> int:
    """Download the file to `path` unless it is complete; return a descriptor with a shared lock on it.

    The process that gets the exclusive lock downloads, the others wait; then it is shared among the readers.
    """
    while True:
        descriptor, claimed = _open_lock(path), False
        try:
            claimed = _flock(descriptor, fcntl.LOCK_EX)
            if claimed and _same(descriptor, path):
                _fetch(file, path)
            if claimed or path.exists():
                while claimed and not _flock(descriptor, fcntl.LOCK_SH):  # another one tests it
                    _pause(POLL)
                if (claimed or _flock(descriptor, fcntl.LOCK_SH)) and _same(descriptor, path) and path.exists():
                    return descriptor
        except BaseException:
            began = any(each.exists() and each.stat().st_size for each in (path, _beside(path, "part")))
            if claimed and _same(descriptor, path) and not began:
                _remove(path)  # there is nothing that the next try could resume
            os.close(descriptor)
            raise
        os.close(descriptor)
        _pause(POLL)


def _open_lock(path: Path) -> int:
    return os.open(_beside(path, "lock"), os.O_RDWR | os.O_CREAT, 0o600)


def _flock(descriptor: int, kind: int) -> bool:
    """Lock without waiting; False if another process holds the lock."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Check that the lock is still the one of that name: its last holder may have removed it with the file."""
    try:
        return os.path.samestat(os.fstat(descriptor), _beside(path, "lock").stat())
    except FileNotFoundError:
        return False


# -- downloading -----------------------------------------------------------------------------------------------------
def _fetch(file: RemoteFile, path: Path) -> None:
    """Download the rest of the file; for the holder of the exclusive lock."""
    size = path.stat().st_size if path.exists() else None
    if size is not None and file.etag and size == file.size:
        return
    if size is not None:
        path.rename(_beside(path, "part"))  # the server will tell if it is still the file
    try:
        part = _PartialFile(file, path)
        _receive_all(file, part)
        _beside(path, "part").rename(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            errno.ENOSPC,
            f"no room in the scratch folder {path.parent} for {file.name}"
            f"{f' of {file.size} bytes' if file.size else ''} ({error.strerror}); "
            "free some, or set resources.scratch to a folder on a larger disk",
        ) from error


def _receive_all(file: RemoteFile, part: "_PartialFile") -> None:
    """Request the rest of the file until it is complete.

    Raises:
        OSError: `TRIES` failures in a row without progress.
    """
    backoff, most = Backoff(PAUSE, LONGEST_PAUSE, jitter=(0.5, 1.0), tries=TRIES), part.have
    while True:
        try:
            _receive(file, part)
            part.check()
            return
        except TransientError as error:
            if isinstance(error, ChangedError):
                part.restart()
            # bytes that a part had before its restart are no progress: so this ends
            if part.most >= most + PROGRESS:
                backoff.reset()
            most = max(most, part.most)
            pause = backoff.next_pause()
            if pause is None:
                total = part.version.size or file.size
                raise OSError(
                    f"{file.name}: {shown(file.url)} is given up after {TRIES} tries without headway, with {part.have} "
                    f"of {'?' if total is None else total} bytes; the last one: {error}; check the connection"
                ) from error
            _pause(pause if error.wait is None else min(max(error.wait, pause), LONGEST_WAIT))


def _receive(file: RemoteFile, part: "_PartialFile") -> None:
    """Make one request for the rest of the file and write what comes.

    Raises:
        TransientError: a transient failure, or the file was changed.
    """
    total = part.version.size
    if total is not None and part.have >= total and file.etag and part.have:
        return
    # of a complete part the last byte is requested, as a server has no other way to confirm the version
    start = part.have - 1 if total is not None and 0 < part.have == total else part.have
    with transfer(file, start, part.version) as answer:
        if file.size is not None and answer.version.size not in (None, file.size):
            part.restart()
            raise TransientError(f"{file.size} bytes were expected, the server says {answer.version.size}")
        if answer.start == 0 or not part.have:
            part.restart(answer.version)
        elif not file.etag and part.version.differs(answer.version):
            raise ChangedError("the file was changed on the server")
        part.make_room()
        began, since = time.monotonic(), 0
        with part.open_at(answer.start) as stream:
            for chunk in answer.chunks:
                part.write(stream, chunk)
                alive()
                since += len(chunk)
                if (now := time.monotonic()) - began > SLOW_SECONDS:
                    if since < SLOW_BYTES:
                        raise TransientError(f"{since} bytes in {now - began:.0f} seconds")
                    began, since = now, 0


class _PartialFile:
    """The bytes of a file so far, and its version as the server stated it."""

    def __init__(self, file: RemoteFile, path: Path):
        self._file, self._path, self._about = file, _beside(path, "part"), _beside(path, "about")
        self.version = Version(file.size)
        try:
            self.version = Version(**json.loads(self._about.read_text()))
            self.have = self._path.stat().st_size
        except (OSError, ValueError, TypeError):  # there is none, or its version is unknown
            self.have = 0
        self.most = self.have
        self._hash, self._hashed = hashlib.sha256(), 0

    def restart(self, version: Version | None = None) -> None:
        """Begin again with the first byte, of the version that the server has now."""
        self.version = version or Version(self._file.size)
        with self._path.open("wb"):
            self.have = 0
        self._about.write_text(json.dumps(asdict(self.version)))
        self._hash, self._hashed = hashlib.sha256(), 0

    def make_room(self) -> None:
        """Raise OSError (ENOSPC) if the rest does not fit, before hours are spent on it."""
        rest = (self.version.size or self.have) - self.have
        if rest > shutil.disk_usage(self._path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_at(self, start: int) -> FileIO:
        """Open the file to write from byte `start` on; the bytes behind it are dropped."""
        stream = FileIO(self._path, "r+")
        stream.truncate(start)
        stream.seek(start)
        if self._hashed != start:
            self._hashed = -1  # hashed from the file at the end
        self.have = start
        return stream

    def write(self, stream: FileIO, data: bytes) -> None:
        size = self.version.size
        if size is not None and self.have + len(data) > size:
            self.restart()
            raise TransientError(f"more came than the {size} bytes that were announced")
        if self._hashed == self.have:
            self._hash.update(data)
            self._hashed += len(data)
        view = memoryview(data)
        while view:
            written = stream.write(view)
            view = view[written:]
            self.have += written
        self.most = max(self.most, self.have)

    def check(self) -> None:
        """Check the size and, if it is listed, the sha256.

        Raises:
            TransientError: bytes are missing, or they are others.
        """
        size = self._file.size if self._file.size is not None else self.version.size
        if size is not None and self.have < size:
            raise TransientError(f"the transfer broke off after {self.have} of {size} bytes")
        if not self._path.exists():  # an empty file
            self.restart()
        if re.fullmatch(r"[0-9a-f]{64}", self._file.etag) and self._sha256() != self._file.etag:
            self.restart()
            raise TransientError("its sha256 is not the one that the hub lists")

    def _sha256(self) -> str:
        if self._hashed != self.have:
            with self._path.open("rb") as stream:
                self._hash = hashlib.sha256()
                while block := stream.read(BLOCK):
                    self._hash.update(block)
                    alive()
            self._hashed = self.have
        return self._hash.hexdigest()


def _pause(seconds: float) -> None:
    """Sleep, and report this process as alive meanwhile: a wait for a server or another process is no hang."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        alive()
        time.sleep(min(left, 1.0))
