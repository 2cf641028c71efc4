"""Bring a list of URLs onto this machine as one plain file of lines: from elsewhere, unpacked, Parquet as JSON lines.

A list that is such a file already is read where it is. Of others there is a copy in the scratch folder, named by its
hash, which a worker on another machine makes again.
"""

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.secrets import without_secrets
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.patterns import WILD
from microdit.pipeline.files.remote_file import RemoteFile, digest
from microdit.pipeline.files.scratch import make_scratch, scratch_folder
from microdit.pipeline.files.tars import BZIP2, GZIP, XZ, ZSTD, ArchiveError
from microdit.pipeline.files.unpacked import unpacked

PREFIX = "microdit-list-"
OLD = 7 * 24 * 3600.0  # seconds after its last use until a copy is removed
BLOCK = 1 << 20
ROWS = 1024  # of a Parquet table that are read at once
BUFFER = 1 << 20  # bytes of it that are read ahead; without it a row group is read as a whole
POLL = 0.2
PARQUET = b"PAR1"
PACKED = (PARQUET, GZIP, BZIP2, XZ, ZSTD)


@dataclass(frozen=True)
class ListText:
    """A list as a plain file of lines."""

    files: tuple[RemoteFile, ...]
    scratch: Path
    limit: int | None = None
    """Rows of Parquet tables that are wanted."""
    sha256: str = ""
    """Hash of the copy; empty if the list is read where it is."""

    @classmethod
    def find(cls, pattern: str | Path, what: str, scratch: Path | None = None, limit: int | None = None) -> "ListText":
        """Find a list, and make the copy if there has to be one.

        Args:
            pattern: as `list_files` has it.
            what: the field of the config, for messages.

        Raises:
            RequestError: it is not there, or damaged.
            OSError: it cannot be read.
        """
        scratch = scratch or scratch_folder(None)
        if "://" not in str(pattern):
            path = Path(pattern).expanduser().absolute()
            if path.exists() or not WILD.search(str(pattern)):
                file = RemoteFile(path.name, str(path), etag=_version(path))
                text = cls((file,), scratch, limit)
                return replace(text, sha256=text._make(what)) if _is_packed(path) else text
        text = cls(list_files(str(pattern), what).files, scratch, limit)
        return replace(text, sha256=text._make(what))

    def path(self) -> Path:
        """Return the plain file; on a machine that has no copy it is made.

        Raises:
            UnreadableError: the list is another one by now.
        """
        if not self.sha256:
            return Path(self.files[0].url)
        path = self.scratch / f"{PREFIX}{self.sha256}"
        with suppress(FileNotFoundError):
            os.utime(path)
            return path
        if self._make("the list") != self.sha256:
            raise UnreadableError(
                f"the list {without_secrets(self.files[0].url)} is another one than at the beginning of the build; "
                "put that one back, then --retry-failed"
            )
        return path

    def at_least(self, rows: int, what: str) -> "ListText":
        """Return the list with so many rows, where the copy was cut to fewer."""
        if not self.sha256 or self.limit is None or self.limit >= rows:
            return self
        longer = replace(self, limit=rows)
        return replace(longer, sha256=longer._make(what))

    def _make(self, what: str) -> str:
        """Make the copy unless there is one; return its hash."""
        make_scratch(self.scratch)
        known = self.scratch / f"{PREFIX}{self._identity()}.known"
        with _locked(known.with_suffix(".lock")):
            if all(file.etag for file in self.files) and known.exists():
                sha256 = known.read_text()
                with suppress(FileNotFoundError):
                    os.utime(self.scratch / f"{PREFIX}{sha256}")
                    return sha256
            _sweep(self.scratch)
            part = self.scratch / f"{PREFIX}{uuid.uuid4().hex}.part"
            try:
                sha256 = self._write(part, what)
                part.rename(self.scratch / f"{PREFIX}{sha256}")
            finally:
                part.unlink(missing_ok=True)
            known.write_text(sha256)
            return sha256

    def _identity(self) -> str:
        rows = ((file.name, file.url, file.size, file.etag, self.limit) for file in self.files)
        return digest(rows)[:32]

    def _write(self, part: Path, what: str) -> str:
        hashed = hashlib.sha256()
        with part.open("wb") as out:
            left, header, ended = self.limit, None, True
            for file in self.files:
                with local_copy(file, self.scratch) as path:
                    try:
                        if not ended:
                            out.write(b"\n")
                            hashed.update(b"\n")
                        for block in _json_lines(path, left) if _starts(path, PARQUET) else _lines(path, header):
                            alive()
                            out.write(block)
                            hashed.update(block)
                            if _starts(path, PARQUET) and left is not None:
                                left -= block.count(b"\n")
                            if header is None:
                                header = block.split(b"\n")[0]
                            ended = block.endswith(b"\n")
                    except (ArchiveError, pa.ArrowException) as error:
                        text = " ".join(str(error).split())[:300]
                        raise RequestError(f"{what}: {file.name} is damaged: {text}; expected a whole list") from error
                if left == 0:
                    break
        return hashed.hexdigest()


def _version(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _starts(path: Path, *magics: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(magics)


def _is_packed(path: Path) -> bool:
    return path.is_file() and _starts(path, *PACKED)


def _lines(path: Path, header: bytes | None) -> Iterator[bytes]:
    """Read a text; without its first line if that is the header of the list's first file."""
    with unpacked(path) as file:
        first = file.readline(BLOCK)
        if header is None or first.strip() != header.strip() or b"://" in header or header.startswith(b"{"):
            yield first
        yield from iter(lambda: file.read(BLOCK), b"")


def _json_lines(path: Path, limit: int | None) -> Iterator[bytes]:
    """Write the rows of a Parquet table as JSON, without its columns of bytes."""
    with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as table:
        names = [field.name for field in table.schema_arrow if not _holds_bytes(field.type)]
        rows = (row for batch in table.iter_batches(ROWS, columns=names, use_threads=False) for row in _rows(batch))
        while block := b"".join(islice(rows if limit is None else islice(rows, limit), ROWS)):
            yield block
            limit = None if limit is None else limit - block.count(b"\n")


def _rows(batch: pa.RecordBatch) -> Iterable[bytes]:
    try:
        values = batch.to_pylist()
    except (ValueError, OverflowError):  # a text that is none, or a date before all dates: its row alone fails
        return [_row(batch.slice(n, 1)) for n in range(batch.num_rows)]
    return map(_line, values)


def _row(batch: pa.RecordBatch) -> bytes:
    try:
        return _line(batch.to_pylist()[0])
    except (ValueError, OverflowError) as error:
        return " ".join(f"row cannot be read: {error}".split()).encode("utf-8", "replace") + b"\n"


def _line(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_holds_bytes(kind.field(n).type) for n in range(kind.num_fields))
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time make a copy."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                alive()
                time.sleep(POLL)
        yield


def _sweep(scratch: Path) -> None:
    """Remove copies that were not used for a week."""
    for path in scratch.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if path.suffix != ".lock" and time.time() - path.stat().st_mtime > OLD:
                path.unlink()
