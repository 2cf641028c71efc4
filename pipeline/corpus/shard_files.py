"""The data objects of one shard: tars that stock webdataset reads, and parquet sidecars.

The contract: docs/reference/corpus.md, section 3.
"""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

# the first columns of every sidecar; the column's own scalars follow
SIDECAR = pa.schema(
    [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
    ]
)

TABLE_BYTES, ROW_BYTES = 1 << 28, 1 << 16  # at most, uncompressed: whatever its rows are, and more for each of them

SCALAR_TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}


class RowCountError(ValueError):
    """A sidecar has other rows than its commit says."""


class ColumnTypeError(ValueError):
    """A sidecar lacks a column, or has it with another type than is declared."""


def sidecar_schema(scalars: Mapping[str, str]) -> pa.Schema:
    """Build the parquet schema of a column's sidecar; `scalars` maps names to type names (`SCALAR_TYPES`)."""
    return pa.schema([*SIDECAR, *(pa.field(name, SCALAR_TYPES[kind]) for name, kind in scalars.items())])


def check_types(schema: pa.Schema, scalars: Mapping[str, str]) -> None:
    """Hold the schema of a sidecar against the declared scalars; it may have columns more.

    Raises:
        ColumnTypeError: a column is missing, or of another type.
    """
    types = dict(zip(schema.names, schema.types, strict=True))
    for field in sidecar_schema({name: kind for name, kind in scalars.items() if kind in SCALAR_TYPES}):
        if types.get(field.name) != field.type:
            raise ColumnTypeError(
                f"its column {field.name} is {str(types.get(field.name, 'missing'))[:200]}, expected {field.type}"
            )


class TarWriter:
    """Write a webdataset tar whose bytes depend on nothing but its samples."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._extensions: list[str] | None = None

    def add(self, key: str, members: Mapping[str, bytes]) -> tuple[int, int]:
        """Write one sample's members, `{extension: bytes}`; returns offset and size of the first one's data.

        Raises:
            ValueError: no members, other extensions than the samples before, or a name above 100 characters.
        """
        extensions = list(members)
        if not extensions or extensions != (self._extensions or extensions):
            raise ValueError(f"sample {key}: its members are {extensions}, expected {self._extensions or 'some'}")
        self._extensions = extensions
        offset, size = 0, -1
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
            if size < 0:
                offset, size = self._file.tell(), len(data)
            self._file.write(data)
            self._file.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset, size

    def close(self) -> None:
        """Write the end of the tar; a second call does nothing."""
        if not self._file.closed:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark, then padding to whole records
            self._file.write(bytes(-self._file.tell() % tarfile.RECORDSIZE))
            self._file.close()


def read_tar(file: BinaryIO) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Read the samples of a tar in order, as (key, {extension: bytes}); the key ends at the first dot.

    Raises:
        tarfile.TarError: the tar is damaged.
        ValueError: a member is no regular file.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            name, _, extension = info.name.partition(".")
            if name != key:
                if key is not None:
                    yield key, members
                key, members = name, {}
            data = tar.extractfile(info) if info.isfile() else None
            if data is None:
                raise ValueError(f"{info.name} is no regular file")
            members[extension] = data.read()
    if key is not None:
        yield key, members


def write_table(path: Path, table: pa.Table) -> None:
    """Write a sidecar, or the object of a table, as Parquet."""
    pq.write_table(table, path, compression="zstd")


def open_table(source: Any, rows: int | None = None) -> pq.ParquetFile:
    """Open Parquet and hold its footer against what is expected, before anything else of it is read.

    rows: how many there have to be, as the commit says; None where no commit says it.

    Raises:
        RowCountError: there are more or fewer.
        ValueError: uncompressed it would be larger than any sidecar of so many rows.
    """
    file = pq.ParquetFile(source)
    check_footer(file.metadata, rows)
    return file


def check_footer(footer: pq.FileMetaData, rows: int | None, said_by: str = "the commit") -> None:
    """Hold a Parquet footer against a number of rows, and each row group against what so many rows may have.

    Raises:
        RowCountError: there are more or fewer.
        ValueError: uncompressed a row group would be larger than any of so many rows.
    """
    groups = [footer.row_group(n) for n in range(footer.num_row_groups)]
    found = max(footer.num_rows, sum(group.num_rows for group in groups))
    if rows is not None and found != rows:
        raise RowCountError(f"it has {found:,} rows, {said_by} says {rows if rows >= 0 else 'nothing'}")
    for group in groups:
        size = sum(group.column(n).total_uncompressed_size for n in range(group.num_columns))
        most = TABLE_BYTES + ROW_BYTES * group.num_rows
        if size > most:
            raise ValueError(
                f"uncompressed {group.num_rows:,} of its rows have {size:,} bytes; expected at most {most:,}"
            )


def read_table(data: bytes, rows: int | None = None) -> pa.Table:
    """Read Parquet bytes. Raises as `open_table`."""
    return open_table(io.BytesIO(data), rows).read()


def sidecar_table(rows: list[dict[str, Any]], scalars: Mapping[str, str]) -> pa.Table:
    """Build a sidecar of rows, ordered by row; a name that is absent from a row is null there.

    Raises:
        ValueError: the rows are not exactly 0, 1, 2, ..., a key is there twice, or a scalar is not declared.
    """
    rows = sorted(rows, key=lambda row: row["row"])
    numbers = [row["row"] for row in rows]
    if numbers != list(range(len(rows))):
        raise ValueError(f"rows must be 0 to {len(rows) - 1} without gap or repetition, got {numbers[:8]}...")
    keys = Counter(row["key"] for row in rows)
    if len(keys) != len(rows):
        raise ValueError(f"key {keys.most_common(1)[0][0]!r} is there {keys.most_common(1)[0][1]} times in one shard")
    schema = sidecar_schema(scalars)
    if unknown := {name for row in rows for name in row}.difference(schema.names):
        raise ValueError(f"scalars {sorted(unknown)} are not declared; declared are {sorted(scalars)}")
    return pa.Table.from_pylist(rows, schema=schema)
