"""Read the rows of join tables from parquet, JSON lines and tar files."""

import gzip
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.files.archives import stem
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.tars import tar_chunks, tar_members
from microdit.pipeline.tables.joins.spec import JoinSpec

BATCH = 8192
MAX_LINE, MAX_TEXT = 4 << 20, 256 << 10
EXAMPLES = 3
SAY_EVERY = 5.0  # seconds


@dataclass
class Tally:
    """What is met while a table is read; what is left out is counted by reason, with the first few named."""

    say: Callable[[str], None]
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    error: BaseException | None = None  # DuckDB makes another one of it

    def leave_out(self, reason: str, example: str, count: int = 1) -> None:
        self.left_out[reason] += count
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{reason}: {example}")

    def read(self, rows: int, name: str) -> None:
        self.rows += rows
        if (now := time.monotonic()) - self.said >= SAY_EVERY:
            self.said = now
            self.say(f"{name}: {self.rows:,} rows read, {self.rows / (now - self.began):,.0f} a second")


def readers_of(spec: JoinSpec, scratch: Path, tally: Tally) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of all batches, and the batches of all files: key, number (of the row), fields."""
    if spec.reader == "parquet":
        with (
            local_copy(spec.listing.files[0], scratch) as path,
            _parquet_file(path, spec, spec.listing.files[0].name) as file,
        ):
            empty = _flattened(file.schema_arrow.empty_table(), spec)
            types = [empty[column].type for column in spec.fields.values()]
        types = [t.value_type if pa.types.is_dictionary(t) else t for t in types]
    else:
        types = [pa.string()] * len(spec.fields)
    fields = [pa.field(f"f{i}", kind) for i, kind in enumerate(types)]
    schema = pa.schema([pa.field("key", pa.string()), pa.field("number", pa.int64()), *fields])
    return schema, _batches(spec, schema, scratch, tally)


def _batches(spec: JoinSpec, schema: pa.Schema, scratch: Path, tally: Tally) -> Iterator[pa.RecordBatch]:
    read = {"parquet": _parquet, "jsonl": _jsonl, "tar_txt": _tar_txt, "tar_jsonl": _tar_jsonl}[spec.reader]
    makers: dict[str, Callable[[str], str]] = {"": str, "stem": _only_stem, "path_dir_stem": _dir_and_stem}
    make = makers[spec.key_of]
    number = 0
    for source in spec.listing.files:
        with local_copy(source, scratch) as path:
            for keys, values in read(path, spec, tally, source.name):
                there = [key is not None and key != "" for key in keys]
                if missing := there.count(False):
                    tally.leave_out("no_key", f"{missing:,} rows near row {number:,} of {source.name}", missing)
                made = [_text(make(str(key))) for key, ok in zip(keys, there, strict=True) if ok]
                columns = [pa.array(made, pa.string()), pa.array(range(number, number + len(made)), pa.int64())]
                mask = pa.array(there, pa.bool_())
                for kind, column in zip(schema.types[2:], values, strict=True):
                    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
                    columns.append(pc.cast(whole.filter(mask), kind))
                number += len(made)
                tally.read(len(made), source.name)
                yield pa.RecordBatch.from_arrays(columns, schema=schema)


def kept_columns(batches: Iterator[pa.RecordBatch], tally: Tally) -> Iterator[pa.RecordBatch]:
    """The batches; what ends them is kept, a signal's exception too."""
    try:
        yield from batches
    except BaseException as error:
        tally.error = error
        raise


_Rows = Iterator[tuple[Sequence[Any], Sequence[Any]]]  # keys, and a column of values for each field


def _parquet(path: Path, spec: JoinSpec, tally: Tally, name: str) -> _Rows:
    wanted = [*spec.key.split("/"), *spec.fields.values()]
    with _parquet_file(path, spec, name) as file:
        for batch in file.iter_batches(BATCH, columns=wanted):
            table = _flattened(pa.Table.from_batches([batch]), spec)
            parts = [_valid(pc.cast(table[column], pa.string(), safe=False)) for column in spec.key.split("/")]
            keys = parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, "/")
            yield keys.to_pylist(), [_valid(table[column]) for column in spec.fields.values()]


def _valid(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings with what is no UTF-8 in them replaced: Parquet files may hold it, and reading does not look."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        values = column.cast(pa.large_binary()).to_pylist()
        texts = [None if value is None else value.decode("utf-8", "replace") for value in values]
        return pa.chunked_array([pa.array(texts, column.type)])
    return column


def _parquet_file(path: Path, spec: JoinSpec, name: str) -> pq.ParquetFile:
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
                raise RequestError(
                    f"{spec.what}: table {name}: there is no column {column!r}; it has {', '.join(schema.names[:40])}"
                )
            kind = kind.field(index).type
    return file


def _flattened(table: pa.Table, spec: JoinSpec) -> pa.Table:
    """With a column for each dotted name."""
    for column in {*spec.key.split("/"), *spec.fields.values()} - set(table.column_names):
        table = table.append_column(column, pc.struct_field(table[column.split(".")[0]], column.split(".")[1:]))
    return table


def _jsonl(path: Path, spec: JoinSpec, tally: Tally, name: str) -> _Rows:
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        yield from _parsed(_lines(file, tally, name), spec, tally, name)


def _tar_jsonl(path: Path, spec: JoinSpec, tally: Tally, name: str) -> _Rows:
    chunks = tar_chunks(path, lambda member: stem(member)[1].endswith(("json", "jsonl")))
    yield from _parsed(_lines(io.BufferedReader(_Chunks(chunks)), tally, name), spec, tally, name)


def _tar_txt(path: Path, spec: JoinSpec, tally: Tally, name: str) -> _Rows:
    found = tar_members(path, lambda member: stem(member)[1] == "txt", MAX_TEXT)
    while some := list(islice(found, BATCH)):
        keys, texts = [], []
        for member in some:
            if member.data is None:
                tally.leave_out(member.reason or "missing", f"{member.name or name}: {member.detail}")
            else:
                keys.append(_text(member.name))
                texts.append(member.data.decode("utf-8", "replace"))
        yield keys, [pa.array(texts, pa.string())] * len(spec.fields)


def _lines(file: BinaryIO, tally: Tally, name: str) -> Iterator[bytes]:
    """Lines, of which none is longer than MAX_LINE; ends, and says so, where the file is broken."""
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
    except (OSError, EOFError, ValueError) as error:  # gzip: cut, or a wrong checksum
        if isinstance(error, OSError) and error.errno is not None:
            raise
        tally.leave_out("damaged", f"{name} ends behind line {number:,}: {error}")


def _parsed(lines: Iterable[bytes], spec: JoinSpec, tally: Tally, name: str) -> _Rows:
    rest, number, met, last = iter(lines), 0, False, ""
    unseen = {place.split(".")[0] for place in spec.fields.values()}
    while some := list(islice(rest, BATCH)):
        keys: list[str | None] = []
        values: list[list[str | None]] = [[] for _ in spec.fields]
        for line in some:
            number += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                tally.leave_out("no_json", f"line {number:,} of {name}: {error}")
                continue
            if not isinstance(row, dict):
                tally.leave_out("no_json", f"line {number:,} of {name}: {line[:60]!r} is no object")
                continue
            unseen -= row.keys()
            last = ", ".join(list(row)[:40])
            met = met or spec.key.split("/")[0].split(".")[0] in row
            if not met and number > 100:
                raise RequestError(f"{spec.what}: table {name}: there is no column {spec.key!r}; it has {last}")
            parts = [_inside(row, part) for part in spec.key.split("/")]
            keys.append(None if None in parts else "/".join(map(str, parts)))
            for column, place in zip(values, spec.fields.values(), strict=True):
                value = _inside(row, place)
                text = value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)
                column.append(None if text is None else _text(text))
        yield keys, [pa.array(column, pa.string()) for column in values]
    if last and unseen:
        missing = ", ".join(map(repr, sorted(unseen)))
        raise RequestError(f"{spec.what}: table {name}: there is no column {missing}; it has {last}")


def _inside(row: Any, place: str) -> Any:
    for part in place.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _only_stem(path: str) -> str:
    return stem(path)[0]


def _dir_and_stem(path: str) -> str:
    folder, _, _ = path.rpartition("/")
    return f"{folder.rpartition('/')[2]}/{stem(path)[0]}"


def _text(text: str) -> str:
    """Without lone surrogates, which JSON and tars can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a file."""

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
