"""Publish a cached table, and find it again."""

import atexit
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from microdit.pipeline.base.digest import sha256_file
from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import TABLE
from microdit.pipeline.corpus.records import ObjectRef, Record, Size
from microdit.pipeline.corpus.shard_files import check_footer


class Table(Record):
    """The record of a published table: its object, and its number of rows."""

    object: ObjectRef
    rows: Size

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode a stored record.

        Raises:
            ValueError: it is none, or names an object that is no table's.
        """
        table = super().parse(data)
        if not TABLE.fullmatch(table.object.name):
            raise ValueError(f"it names {table.object.name!r}, which is no table")
        return table


T = TypeVar("T", bound=Table)


@contextmanager
def if_allowed() -> Iterator[None]:
    """Leave the block quietly where there is no right to write: the right to read is enough to inspect a corpus."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError, PermissionError):
        pass
    except OSError as error:
        if error.errno != errno.EROFS:
            raise


def publish(corpus: Corpus, base: str, write: Callable[[Path], int], record: Callable[[ObjectRef, int], T]) -> T:
    """Publish the table `base`: its object first, then `<base>.json`, which names it. The first writer wins.

    Args:
        write: writes the object at a path; returns its number of rows.
        record: builds the record from the object and its number of rows.
    """
    name = f"{base}.{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(4).hex()}.parquet"
    with corpus.store.scratch(name) as path:
        rows = write(path)
        data = ObjectRef(name=name, size=path.stat().st_size, sha256=sha256_file(path))
        corpus.store.publish({name: path})
    table = record(data, rows)
    try:
        corpus.store.create(f"{base}.json", table.to_bytes())
    except FileExistsError:  # another writer was faster, or the record is damaged
        if winner := cached(corpus, base, type(table)):
            corpus.store.delete([name])
            return winner
        corpus.store.delete([f"{base}.json"])
        corpus.store.create(f"{base}.json", table.to_bytes())
    return table


def cached(corpus: Corpus, base: str, kind: type[T], since: datetime | None = None) -> T | None:
    """Read the record of a published table; None if there is none, its object is gone, or it is older than `since`.

    Args:
        since: when the newest of the commits in it was written. Names are no proof: a commit that was removed and made
            again has the name of the old one. An older table is deleted.
    """
    name = f"{base}.json"
    try:
        table = kind.parse(corpus.store.get(name))
    except (FileNotFoundError, ValueError):
        return None
    if not table.object.name.startswith(f"{base}."):
        return None
    if since is not None:
        written = [item.modified for item in corpus.store.list(base.rpartition("/")[0]) if item.name == name]
        if not written or written[0] < since:
            with if_allowed():
                corpus.store.delete([name, table.object.name])
            return None
    return table if corpus.store.exists(table.object.name) else None


def private(write: Callable[[Path], int], record: Callable[[ObjectRef, int], T]) -> T:
    """Make a table for this process alone, where the corpus cannot be written; its object's name is a whole path."""
    path = Path(tempfile.mkdtemp(prefix="microdit-table-")) / "table.parquet"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    rows = write(path)
    return record(ObjectRef(name=str(path), size=path.stat().st_size, sha256=sha256_file(path)), rows)


def open_table(corpus: Corpus, table: Table) -> BinaryIO:
    """Open the object of a table, in the corpus or on this machine, after its footer was held against its record.

    Raises:
        RequestError: it is damaged.
    """
    path = Path(table.object.name)
    file = path.open("rb") if path.is_absolute() else corpus.store.open(table.object.name)
    with damage_of(corpus.url, table):
        check_footer(pq.read_metadata(file), table.rows, "its record")
    file.seek(0)
    return file


@contextmanager
def damage_of(url: str, table: Table) -> Iterator[None]:
    """Turn what a damaged object of a table raises into a RequestError that says how it is made again."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        folder = table.object.name.rpartition("/")[0] or "tables"
        raise RequestError(
            f"corpus {url}: {table.object.name} is damaged ({first_line(error)}); remove the folder {folder}, it is "
            "made again"
        ) from None
