"""Tables of what else is known about samples: captions, scores. Sorted once by key, then looked up by any worker.

Such tables come with millions of rows in any order and in four kinds of files. The driver streams one through DuckDB's
sort, which spills to disk, into a Parquet file in the corpus (`tables/joins/`, docs/corpus.md, section 6). A worker
reads the row group that a key must be in and keeps a few: neighbours in key order cost one read, and no table is ever
in memory as a whole.
"""

import gzip
import hashlib
import io
import json
import shutil
import time
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus import Corpus
from pipeline.database import connect
from pipeline.errors import RequestError
from pipeline.records import ObjectRef, canonical
from pipeline.sources.archives import stem, tar_members
from pipeline.sources.remote import Listing, local_copy
from pipeline.sources.tars import tar_chunks
from pipeline.store import Store
from pipeline.tables import JOINS, Table, cached, publish

LAYOUT = 2
ROW_GROUP = 20_480  # rows that a look-up reads at once: some 10 MB of captions
KEPT = 4  # row groups in memory of a worker, for each table
BATCH = 8192
SORT_MEMORY = "600MB"  # of DuckDB; what does not fit goes to the scratch folder
MAX_LINE, MAX_TEXT = 4 << 20, 256 << 10
EXAMPLES = 3
SAY_EVERY = 5.0  # seconds
SPILL, OLD_SPILL = "microdit-join-", 48 * 3600.0  # what killed builds leave in the scratch folder, and seconds


@dataclass(frozen=True)
class JoinSpec:
    """A table to join by key.

    reader: `parquet`; `jsonl`, packed with gzip or not; `tar_txt`: a tar of `<key>.txt`; `tar_jsonl`: a tar that holds
        one .jsonl.
    key: the column of the key, `a/b` for two columns joined by a slash; of no meaning in a `tar_txt`.
    fields: name here: column there, dotted for what is inside another (`Task2.Caption`).
    key_of: what is made of the key: "" nothing, `stem` (of the last part of a path, before its first dot),
        `path_dir_stem` (the folder's name, a slash, the stem).
    """

    listing: Listing
    reader: str
    key: str
    fields: Mapping[str, str]
    key_of: str = ""
    what: str = "table"
    """The field of the config, for messages."""

    @cached_property
    def base(self) -> str:
        """What its objects in the corpus begin with."""
        made_by = [LAYOUT, self._files(), self.reader, self.key, list(self.fields.items()), self.key_of]
        return f"{JOINS}/{hashlib.sha256(canonical({'join': made_by})).hexdigest()[:32]}"

    def _files(self) -> Any:
        """Which files these are. Their listing's identity is too little: it is equal for files of one name on two
        servers, and for a local file that was changed and is as long as before."""
        if "sha256" in self.listing.identity:
            return self.listing.identity
        places = [(file.url.partition("?")[0], file.size, file.etag) for file in self.listing.files]
        return [self.listing.identity, places]


class JoinTable(Table):
    """The record of a table in the corpus: beside it the fields' names, the last key of each row group, and what was
    left out and why. In the file itself the fields are `f0`, `f1`, ..., as SQL would not tell `Long` from `long`."""

    fields: list[str]
    last: list[str]
    left_out: dict[str, int]
    examples: list[str]


@dataclass
class _Tally:
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


def build(corpus: Corpus, spec: JoinSpec, scratch: Path, say: Callable[[str], None]) -> None:
    """Put a table into the corpus, sorted; at once if it is there.

    Of rows with equal keys the first one in the order of the files counts. Rows without a key, lines that are no JSON
    and what lies behind a broken place of an archive are left out; how many stands in the table's record, and is said.

    Raises:
        RequestError: a column is not there, or nothing can be read of it.
    """
    if cached(corpus, spec.base, JoinTable) is not None:
        return
    tally = _Tally(say)
    last: list[str] = []

    def write(path: Path) -> int:
        _write_sorted(spec, scratch, tally, path)
        last.extend(_last_keys(path))
        return tally.rows

    def record(object: ObjectRef, rows: int) -> JoinTable:
        left_out = dict(tally.left_out)
        fields, examples = list(spec.fields), tally.examples
        return JoinTable(object=object, rows=rows, fields=fields, last=last, left_out=left_out, examples=examples)

    publish(corpus, spec.base, write, record)
    say(f"{spec.what}: a table of {tally.rows:,} rows, sorted by key")
    for reason, count in tally.left_out.items():
        say(f"{spec.listing.files[0].name}: {count:,} left out, {reason}")
    for example in tally.examples:
        say(f"{spec.listing.files[0].name}: {example}")


def _write_sorted(spec: JoinSpec, scratch: Path, tally: _Tally, path: Path) -> None:
    scratch.mkdir(parents=True, exist_ok=True)
    for left in scratch.glob(f"{SPILL}*"):
        with suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > OLD_SPILL:
                shutil.rmtree(left)
    with TemporaryDirectory(dir=scratch, prefix=SPILL) as spill:
        options: dict[str, Any] = {"memory_limit": SORT_MEMORY, "temp_directory": spill, "threads": 1}
        schema, batches = _readers(spec, scratch, tally)
        with connect(**options) as database:
            database.register("rows", pa.RecordBatchReader.from_batches(schema, _kept(batches, tally)))
            names = ", ".join(["key", *(f"f{i}" for i in range(len(spec.fields)))])
            try:
                database.execute(
                    f"COPY (SELECT {names} FROM rows ORDER BY key, number) TO '{_quoted(path)}' "
                    f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {ROW_GROUP})"
                )
            except duckdb.Error as error:
                raise (tally.error or error) from None
    if tally.rows == 0:
        files = ", ".join(file.name for file in spec.listing.files[:3])
        found = "; ".join(tally.examples) or "it is empty"
        raise RequestError(f"{spec.what}: nothing in {files} can be read; {found}")


def _last_keys(path: Path) -> list[str]:
    """The last key of each row group: statistics would do, but hold only the beginning of long ones."""
    with pq.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        return [file.read_row_group(number, ["key"])["key"][-1].as_py() for number in groups]


class Joined:
    """A table of `build`. Picklable: workers open it at the first look-up."""

    def __init__(self, store: Store, spec: JoinSpec):
        self._store, self._base = store, spec.base
        self._groups: OrderedDict[int, tuple[list[str], pa.RecordBatch]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _joined, (self._store, self._base)

    def get(self, key: str) -> dict[str, Any] | None:
        """The fields of a key; None if the table has it not."""
        number = bisect_left(self._table.last, key)
        if number == len(self._table.last):
            return None
        keys, rows = self._group(number)
        place = bisect_left(keys, key)
        if place == len(keys) or keys[place] != key:
            return None
        return dict(zip(self._table.fields, rows.slice(place, 1).to_pylist()[0].values(), strict=True))

    def get_many(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The fields of those keys that the table has. Each part of it is read once at most, however they come."""
        return {key: found for key in sorted(set(keys)) if (found := self.get(key)) is not None}

    @cached_property
    def _table(self) -> JoinTable:
        return JoinTable.parse(self._store.get(f"{self._base}.json"))

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._store.open(self._table.object.name))

    def _group(self, number: int) -> tuple[list[str], pa.RecordBatch]:
        if number not in self._groups:
            table = self._file.read_row_group(number).combine_chunks()
            keys = table["key"].to_pylist()
            self._groups[number] = keys, table.drop_columns(["key"]).to_batches()[0]
            while len(self._groups) > KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(number)
        return self._groups[number]


def _joined(store: Store, base: str) -> Joined:
    joined = Joined.__new__(Joined)
    joined._store, joined._base, joined._groups = store, base, OrderedDict()
    return joined


# -- the four kinds of files -------------------------------------------------------------------------------------------


def _readers(spec: JoinSpec, scratch: Path, tally: _Tally) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
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


def _batches(spec: JoinSpec, schema: pa.Schema, scratch: Path, tally: _Tally) -> Iterator[pa.RecordBatch]:
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


def _kept(batches: Iterator[pa.RecordBatch], tally: _Tally) -> Iterator[pa.RecordBatch]:
    """The batches; what ends them is kept, a signal's exception too."""
    try:
        yield from batches
    except BaseException as error:
        tally.error = error
        raise


_Rows = Iterator[tuple[Sequence[Any], Sequence[Any]]]  # keys, and a column of values for each field


def _parquet(path: Path, spec: JoinSpec, tally: _Tally, name: str) -> _Rows:
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


def _jsonl(path: Path, spec: JoinSpec, tally: _Tally, name: str) -> _Rows:
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        yield from _parsed(_lines(file, tally, name), spec, tally, name)


def _tar_jsonl(path: Path, spec: JoinSpec, tally: _Tally, name: str) -> _Rows:
    chunks = tar_chunks(path, lambda member: stem(member)[1].endswith(("json", "jsonl")))
    yield from _parsed(_lines(io.BufferedReader(_Chunks(chunks)), tally, name), spec, tally, name)


def _tar_txt(path: Path, spec: JoinSpec, tally: _Tally, name: str) -> _Rows:
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


def _lines(file: BinaryIO, tally: _Tally, name: str) -> Iterator[bytes]:
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


def _parsed(lines: Iterable[bytes], spec: JoinSpec, tally: _Tally, name: str) -> _Rows:
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


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


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
