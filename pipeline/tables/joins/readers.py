"""Read the rows of join tables from parquet, JSON, CSV and tar files."""

import csv
import gzip
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.content.caption_faults import SURROGATES
from microdit.pipeline.content.text_bytes import NotTextError, checked_text, decode_text
from microdit.pipeline.files.archives import is_of_macos, stem
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.tars import tar_chunks, tar_members
from microdit.pipeline.tables.joins.spec import JoinSpec, prefix_of

BATCH = 8192
MAX_LINE, MAX_TEXT = 4 << 20, 256 << 10
MAX_LIST = 512 << 20  # bytes of a json that is one list
EXAMPLES = 3
SAY_EVERY = 5.0  # seconds
LINES_WITHOUT_KEY = 100  # read before a key column that no line has had is an error
NAMED = 40  # columns in a message

_Columns = tuple[Sequence[Any], Sequence[Any]]  # of a few rows: the keys, and one array of values for each field


@dataclass
class JoinTally:
    """Count the rows that are read, and those left out by reason, with the first few as examples."""

    report: Callable[[str], None]
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    reported: float = field(default_factory=time.monotonic)
    error: BaseException | None = None  # DuckDB raises another one in its stead

    def leave_out(self, reason: str, example: str, count: int = 1) -> None:
        self.left_out[reason] += count
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{reason}: {example}")

    def add(self, rows: int, name: str) -> None:
        """Count rows of the file `name`, and report the rate every few seconds."""
        self.rows += rows
        if (now := time.monotonic()) - self.reported >= SAY_EVERY:
            self.reported = now
            self.report(f"{name}: {self.rows:,} rows read, {self.rows / (now - self.began):,.0f} a second")


def read_table(spec: JoinSpec, scratch: Path, tally: JoinTally) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return the schema and the batches of all files: `key`, `number` (of the row), and fields `f0`, `f1`, ..."""
    types = _parquet_types(spec, scratch) if spec.reader == "parquet" else [pa.string()] * len(spec.fields)
    fields = [pa.field(f"f{i}", kind) for i, kind in enumerate(types)]
    schema = pa.schema([pa.field("key", pa.string()), pa.field("number", pa.int64()), *fields])
    return schema, _batches(spec, schema, scratch, tally)


def _batches(spec: JoinSpec, schema: pa.Schema, scratch: Path, tally: JoinTally) -> Iterator[pa.RecordBatch]:
    read = {
        "parquet": _parquet,
        "jsonl": _jsonl,
        "json": _json,
        "csv": _csv,
        "tar_txt": _tar_txt,
        "tar_jsonl": _tar_jsonl,
    }[spec.reader]
    rules: dict[str, Callable[[str], str]] = {"": str, "stem": _only_stem, "path_dir_stem": _dir_and_stem}
    key_of = rules[spec.key_of]
    number = 0
    for source in spec.listing.files:
        before = prefix_of(source) if spec.beside else ""
        with local_copy(source, scratch) as path:
            for keys, columns in read(path, spec, tally, source.name):
                batch = _to_batch(keys, columns, schema, number, key_of, before)
                if without_key := len(keys) - batch.num_rows:
                    tally.leave_out("no_key", f"{without_key:,} rows near row {number:,} of {source.name}", without_key)
                number += batch.num_rows
                tally.add(batch.num_rows, source.name)
                yield batch


def _to_batch(
    keys: Sequence[Any],
    columns: Sequence[Any],
    schema: pa.Schema,
    number: int,
    key_of: Callable[[str], str],
    before: str,
) -> pa.RecordBatch:
    """Make a batch of the rows that have a key, numbered from `number`, with the fields cast to the schema's types."""
    has_key = [key is not None and key != "" and not SURROGATES.search(str(key)) for key in keys]
    made = [before + key_of(str(key)) for key, has in zip(keys, has_key, strict=True) if has]
    arrays = [pa.array(made, pa.string()), pa.array(range(number, number + len(made)), pa.int64())]
    mask = pa.array(has_key, pa.bool_())
    for kind, column in zip(schema.types[2:], columns, strict=True):
        whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        arrays.append(pc.cast(whole.filter(mask), kind))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def record_error(batches: Iterator[pa.RecordBatch], tally: JoinTally) -> Iterator[pa.RecordBatch]:
    """Pass the batches on; record the exception that ends them, a signal's too."""
    try:
        yield from batches
    except BaseException as error:
        tally.error = error
        raise


# -- keys ------------------------------------------------------------------------------------------------------------
def _only_stem(path: str) -> str:
    return stem(path)[0]


def _dir_and_stem(path: str) -> str:
    folder, _, _ = path.rpartition("/")
    return f"{folder.rpartition('/')[2]}/{stem(path)[0]}"


# -- parquet ---------------------------------------------------------------------------------------------------------
def _parquet(path: Path, spec: JoinSpec, tally: JoinTally, name: str) -> Iterator[_Columns]:
    wanted = [*spec.key.split("/"), *spec.fields.values()]
    with _open_parquet(path, spec, name) as file:
        for batch in file.iter_batches(BATCH, columns=wanted):
            table = _flatten(pa.Table.from_batches([batch]), spec)
            casts = [pc.cast(table[column], pa.string(), safe=False) for column in spec.key.split("/")]
            parts = [_valid_text(column, tally, f"a key of {name}") for column in casts]
            keys = parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, "/")
            yield keys.to_pylist(), [_valid_text(table[c], tally, f"{c!r} of {name}") for c in spec.fields.values()]


def _parquet_types(spec: JoinSpec, scratch: Path) -> list[pa.DataType]:
    """Return the types of the fields in the first file; the values' type of a dictionary column."""
    first = spec.listing.files[0]
    with local_copy(first, scratch) as path, _open_parquet(path, spec, first.name) as file:
        empty = _flatten(file.schema_arrow.empty_table(), spec)
        types = [empty[column].type for column in spec.fields.values()]
    return [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in types]


def _open_parquet(path: Path, spec: JoinSpec, name: str) -> pq.ParquetFile:
    """Open a file and check that it has the columns of the key and the fields.

    Raises:
        RequestError: a column is absent, or the file cannot be read.
    """
    try:
        # without both a row group's whole columns are read at once, and all rows may be in one
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{spec.what}: table {name} cannot be read as Parquet: {error}") from error
    schema = file.schema_arrow
    for column in [*spec.key.split("/"), *spec.fields.values()]:
        kind: Any = schema
        for part in column.split("."):
            index = kind.get_field_index(part) if isinstance(kind, pa.Schema | pa.StructType) else -1
            if index < 0:
                raise _no_column(spec, name, repr(column), schema.names)
            kind = kind.field(index).type
    return file


def _no_column(spec: JoinSpec, name: str, missing: str, columns: Sequence[str]) -> RequestError:
    return RequestError(f"{spec.what}: table {name}: there is no column {missing}; it has {', '.join(columns[:NAMED])}")


def _flatten(table: pa.Table, spec: JoinSpec) -> pa.Table:
    """Append a column for each dotted name."""
    for column in {*spec.key.split("/"), *spec.fields.values()} - set(table.column_names):
        table = table.append_column(column, pc.struct_field(table[column.split(".")[0]], column.split(".")[1:]))
    return table


def _valid_text(column: pa.ChunkedArray, tally: JoinTally, what: str) -> pa.ChunkedArray:
    """Leave out the texts of a column that are none, as Parquet files may hold; reading them does not check."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    try:
        column.validate(full=True)
        if not pc.any(pc.match_substring(column, "\0")).as_py():
            return column
    except pa.ArrowInvalid:
        pass
    texts: list[str | None] = []
    for value in column.cast(pa.large_binary()).to_pylist():
        try:
            texts.append(None if value is None else checked_text(value.decode()))
        except ValueError as error:
            tally.leave_out("not_text", f"{what}: {error}")
            texts.append(None)
    return pa.chunked_array([pa.array(texts, column.type)])


# -- tars of texts ---------------------------------------------------------------------------------------------------
def _is_text_member(name: str) -> bool:
    return stem(name)[1] == "txt" and not is_of_macos(name)


def _tar_txt(path: Path, spec: JoinSpec, tally: JoinTally, name: str) -> Iterator[_Columns]:
    for members in chunks(tar_members(path, _is_text_member, MAX_TEXT), BATCH):
        keys, texts = [], []
        for member in members:
            if member.data is None:
                tally.leave_out(member.reason or "missing", f"{member.name or name}: {member.detail}")
            else:
                try:
                    texts.append(decode_text(member.data))
                except NotTextError as error:
                    tally.leave_out("not_text", f"{member.name}: {error}")
                else:
                    keys.append(member.name)
        yield keys, [pa.array(texts, pa.string())] * len(spec.fields)


# -- JSON lines ------------------------------------------------------------------------------------------------------
def _jsonl(path: Path, spec: JoinSpec, tally: JoinTally, name: str) -> Iterator[_Columns]:
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
        yield from _JsonRows(spec, tally, name).columns(_lines(file, tally, name))


def _json(path: Path, spec: JoinSpec, tally: JoinTally, name: str) -> Iterator[_Columns]:
    """Read a json that is one list of objects, as a whole."""
    size = path.stat().st_size
    try:
        rows = json.loads(path.read_bytes()) if size <= MAX_LIST else None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{spec.what}: {name} cannot be read as JSON: {error}") from None
    if not isinstance(rows, list):
        raise RequestError(
            f"{spec.what}: expected {name} to be a list of objects of {MAX_LIST} bytes at most; for more use .jsonl"
        )
    yield from _JsonRows(spec, tally, name).columns(json.dumps(row).encode() for row in rows)


def _csv(path: Path, spec: JoinSpec, tally: JoinTally, name: str) -> Iterator[_Columns]:
    """Read a .csv or .tsv, whose first line names the columns; cells may be quoted and have line breaks."""
    delimiter = "\t" if name.lower().endswith(".tsv") else ","
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)

        def lines() -> Iterator[bytes]:
            while True:
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    tally.leave_out("no_csv", f"line {rows.line_num:,} of {name}: {error}")
                    continue
                if row is None:
                    return
                yield json.dumps({column: value for column, value in row.items() if column}).encode()

        yield from _JsonRows(spec, tally, name).columns(lines())


def _tar_jsonl(path: Path, spec: JoinSpec, tally: JoinTally, name: str) -> Iterator[_Columns]:
    member = tar_chunks(path, lambda name: stem(name)[1].endswith(("json", "jsonl")) and not is_of_macos(name))
    yield from _JsonRows(spec, tally, name).columns(_lines(io.BufferedReader(_ChunkReader(member)), tally, name))


def _lines(file: BinaryIO, tally: JoinTally, name: str) -> Iterator[bytes]:
    """Read lines, leave out those longer than MAX_LINE, and end where the file is damaged; the tally records both."""
    number = 0
    try:
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                tally.leave_out("too_long", f"line {number:,} of {name} is longer than {MAX_LINE} bytes")
                continue
            yield line
    except (OSError, EOFError, ValueError) as error:  # gzip: truncated, or a wrong checksum
        if isinstance(error, OSError) and error.errno is not None:
            raise
        tally.leave_out("damaged", f"{name} ends behind line {number:,}: {error}")


class _JsonRows:
    """Parse JSON lines of one file into keys and columns of text."""

    def __init__(self, spec: JoinSpec, tally: JoinTally, name: str):
        self._spec, self._tally, self._name = spec, tally, name
        self._key_parts = spec.key.split("/")
        self._number = 0  # of the current line
        self._has_key = False
        self._unseen = {column.split(".")[0] for column in spec.fields.values()}
        self._columns: list[str] = []  # of the latest row, for messages

    def columns(self, lines: Iterable[bytes]) -> Iterator[_Columns]:
        """Parse lines, a few at a time.

        Raises:
            RequestError: no row has the key, or one of the fields.
        """
        for some in chunks(lines, BATCH):
            keys: list[str | None] = []
            columns: list[list[str | None]] = [[] for _ in self._spec.fields]
            for row in map(self._parse, some):
                if row is None:
                    continue
                parts = [_nested_value(row, part) for part in self._key_parts]
                keys.append(None if None in parts else "/".join(map(str, parts)))
                for column, name in zip(columns, self._spec.fields.values(), strict=True):
                    column.append(self._as_text(_nested_value(row, name), name))
            yield keys, [pa.array(column, pa.string()) for column in columns]
        if self._columns and self._unseen:
            missing = ", ".join(map(repr, sorted(self._unseen)))
            raise _no_column(self._spec, self._name, missing, self._columns)

    def _parse(self, line: bytes) -> dict[str, object] | None:
        """Parse one line; None if it is blank or no JSON object."""
        self._number += 1
        if not line.strip():
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            self._tally.leave_out("no_json", f"line {self._number:,} of {self._name}: {error}")
            return None
        if not isinstance(row, dict):
            self._tally.leave_out("no_json", f"line {self._number:,} of {self._name}: {line[:60]!r} is no object")
            return None
        self._note_columns(row)
        return row

    def _as_text(self, value: Any, name: str) -> str | None:
        """Return a text as it is, and another value as JSON; None for a text that is none, which the tally counts."""
        text = value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)
        try:
            return None if text is None else checked_text(text)
        except NotTextError as error:
            self._tally.leave_out("not_text", f"{name!r} of line {self._number:,} of {self._name}: {error}")
            return None

    def _note_columns(self, row: dict[str, object]) -> None:
        self._unseen -= row.keys()
        self._columns = list(row)
        self._has_key = self._has_key or self._key_parts[0].split(".")[0] in row
        if not self._has_key and self._number > LINES_WITHOUT_KEY:
            raise _no_column(self._spec, self._name, repr(self._spec.key), self._columns)


def _nested_value(row: Any, name: str) -> Any:
    """Return the value of a dotted name; None if it is absent."""
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


class _ChunkReader(io.RawIOBase):
    """Read chunks of bytes as one file."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._left = memoryview(chunk)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
