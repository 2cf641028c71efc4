"""The files of a join table, read as a stream of (key, fields): parquet, jsonl, tars of texts, tars with jsonl inside.

What cannot be read of a file is counted and told, row by row; only a file that is not what it is said to be, or has not
the columns, ends the reading.
"""

import gzip
import json
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import RequestError
from pipeline.sources.archives import stem, tar_members

BATCH_ROWS, BATCH_BYTES = 8192, 8 << 20
MAX_LINE = 16 << 20  # bytes of a line of jsonl
MAX_VALUE = 1 << 20  # bytes of a value
MAX_KEY = 4096  # characters
NAMED = 5  # rows that cannot be read and are named
SOON = 1000  # rows without a key after which the column is taken for a wrong name
SAY_SECONDS = 5.0


@dataclass
class Notes:
    """What came of reading: rows with a key, rows that cannot be read, rows without a key; the first faults by name."""

    say: Callable[[str], None] = lambda text: None
    label: str = ""
    rows: int = 0
    unreadable: int = 0
    without_key: int = 0
    faults: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """Files of which only the beginning could be read, and why."""
    _said: float = field(default_factory=time.monotonic)

    def bad(self, where: str, why: str) -> None:
        self.unreadable += 1
        if len(self.faults) < NAMED:
            self.faults.append(f"{where}: {why}")

    def took(self, rows: int) -> None:
        self.rows += rows
        if (now := time.monotonic()) - self._said > SAY_SECONDS:
            self._said = now
            self.say(f"{self.label}: {self.rows:,} rows read")


@dataclass(frozen=True)
class Wanted:
    """What to take of a row: the columns of the key, how to cut it, and the columns of the fields by position."""

    keys: tuple[str, ...]
    cut: Callable[[str], str] | None
    fields: tuple[str, ...]


class _Unusable(ValueError):
    """A row that cannot be used, and why."""


# -- keys ------------------------------------------------------------------------------------------------------------


def path_dir_stem(path: str) -> str:
    """`./000/ab.jpg` is `000/ab`."""
    folder, slash, _ = path.removeprefix("./").rpartition("/")
    return f"{folder}{slash}{stem(path)[0]}"


CUTS: Mapping[str, Callable[[str], str] | None] = {
    "": None,
    "stem": lambda name: stem(name)[0],
    "path_dir_stem": path_dir_stem,
}


def key_text(value: Any) -> str | None:
    """A key of any plain type as text; 12.0 is `12`, since a column of integers with gaps is often written so.

    Raises:
        ValueError: it is no plain value.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dict | list | tuple):
        raise _Unusable(f"expected a plain key, found {str(value)[:80]}")
    return str(value)


def _key(values: Iterable[Any], cut: Callable[[str], str] | None) -> str | None:
    """The key that some columns make; None if there is none."""
    parts = [key_text(value) for value in values]
    if any(not part for part in parts):
        return None
    key = "/".join(cast(list[str], parts))
    key = key if cut is None else cut(key)
    if len(key) > MAX_KEY:
        raise _Unusable(f"a key of {len(key)} characters, at most {MAX_KEY} are taken: {key[:80]!r}...")
    key.encode("utf-8")  # lone surrogates
    return key or None


# -- rows one by one -------------------------------------------------------------------------------------------------


class _Batches:
    """Rows put together to record batches: the key, and each field as text."""

    def __init__(self, fields: int, notes: Notes):
        self._schema = pa.schema([("key", pa.string()), *((f"f{i}", pa.string()) for i in range(fields))])
        self._columns: list[list[str | None]] = [[] for _ in range(fields + 1)]
        self._bytes, self._notes = 0, notes

    def add(self, key: str, values: Iterable[str | None]) -> pa.RecordBatch | None:
        for column, value in zip(self._columns, (key, *values), strict=True):
            column.append(value)
            self._bytes += 0 if value is None else len(value)
        if len(self._columns[0]) >= BATCH_ROWS or self._bytes >= BATCH_BYTES:
            return self.end()
        return None

    def end(self) -> pa.RecordBatch:
        arrays = [pa.array(column, pa.string()) for column in self._columns]
        for column in self._columns:
            column.clear()
        self._bytes = 0
        self._notes.took(len(arrays[0]))
        return pa.record_batch(arrays, schema=self._schema)


def read_jsonl(path: Path, name: str, wanted: Wanted, notes: Notes) -> Iterator[pa.RecordBatch]:
    """Lines of JSON objects, behind gzip or not; of each value its JSON text."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        lines = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
        yield from _json_rows([(name, lines)], name, wanted, notes)


def read_tar_jsonl(path: Path, name: str, wanted: Wanted, notes: Notes) -> Iterator[pa.RecordBatch]:
    """The .jsonl files in a tar, packed or not, one after the other."""

    def members(tar: tarfile.TarFile) -> Iterator[tuple[str, BinaryIO]]:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep all
            lines = tar.extractfile(member) if member.isfile() and stem(member.name)[1].endswith("jsonl") else None
            if lines is not None:
                yield f"{name}/{member.name}", cast(BinaryIO, lines)

    try:
        with tarfile.open(path, "r|*") as tar:
            yield from _json_rows(members(tar), name, wanted, notes)
    except tarfile.ReadError as error:
        notes.damaged.append(f"{name}: {error}")


def _json_rows(
    files: Iterable[tuple[str, BinaryIO]], name: str, wanted: Wanted, notes: Notes
) -> Iterator[pa.RecordBatch]:
    batches = _Batches(len(wanted.fields), notes)
    seen = dict.fromkeys(wanted.fields, False)
    found: dict[str, None] = {}  # names that rows have
    good = keyed = 0
    try:
        for place, lines in files:
            for number, line in _lines(lines):
                where = f"{place}, line {number}"
                try:
                    row = _object(line)
                    good += 1
                    if good <= SOON:
                        found.update(dict.fromkeys(list(row)[:50]))
                    key = _key([_dig(row, column) for column in wanted.keys], wanted.cut)
                    if key is not None:
                        values = [_dig(row, column) for column in wanted.fields]
                        texts = [None if value is None else _json_text(value) for value in values]
                except (ValueError, RecursionError) as error:
                    notes.bad(where, str(error))
                    continue
                if key is None:
                    notes.without_key += 1
                    if not keyed and good >= SOON:
                        raise _no_column(name, wanted.keys, "none of the first rows", found)
                    continue
                keyed += 1
                for column, value in zip(wanted.fields, values, strict=True):
                    seen[column] |= value is not None
                if batch := batches.add(key, texts):
                    yield batch
    except (EOFError, zlib.error, tarfile.ReadError, gzip.BadGzipFile) as error:
        notes.damaged.append(f"{name}: behind {good} rows: {error or type(error).__name__}")
    if good and not keyed:
        raise _no_column(name, wanted.keys, "no row", found)
    for column, there in seen.items():
        if keyed and not there:
            raise _no_column(name, [column], "no row", found)
    yield batches.end()


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers; of one that is too long so much that this shows."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        part = line
        while len(part) > MAX_LINE and not part.endswith(b"\n"):
            part = file.readline(MAX_LINE + 1)
        if line.strip():
            yield number, line


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise _Unusable(f"longer than {MAX_LINE} bytes")
    try:
        row = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise _Unusable(f"expected a JSON object, found {line[:80]!r}")
    return row


def _dig(row: dict[str, Any], column: str) -> Any:
    """A value by its name, or by a dotted one; None if it is not there."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _json_text(value: Any) -> str:
    text = json.dumps(value)
    if len(text) > MAX_VALUE:
        raise _Unusable(f"a value of {len(text)} bytes, at most {MAX_VALUE} are taken")
    return text


def read_tar_txt(path: Path, name: str, wanted: Wanted, notes: Notes) -> Iterator[pa.RecordBatch]:
    """The .txt files in a tar, packed or not: the key is in the file's name, the one field its text."""
    batches = _Batches(len(wanted.fields), notes)
    cut = wanted.cut or CUTS["stem"]
    for member in tar_members(path, lambda name: name.lower().endswith(".txt"), MAX_VALUE):
        if member.reason == "damaged_archive":
            notes.damaged.append(f"{name}: {member.detail}")
            continue
        try:
            if member.data is None:
                raise _Unusable(f"{member.reason}: {member.detail}")
            key, text = _key([member.name], cut), member.data.decode("utf-8").strip()
        except ValueError as error:
            notes.bad(f"{name}/{member.name.encode('utf-8', 'replace').decode()}", str(error))
            continue
        if key is None:
            notes.without_key += 1
        elif batch := batches.add(key, [text] * len(wanted.fields)):
            yield batch
    yield batches.end()


# -- parquet ---------------------------------------------------------------------------------------------------------


def read_parquet(path: Path, name: str, wanted: Wanted, notes: Notes) -> Iterator[pa.RecordBatch]:
    """A projection of a parquet file, streamed: no row group in memory. Nested values are JSON text."""
    try:
        # with a buffer, pages are read as they are needed, and not a whole column of a row group at once
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            schema = file.schema_arrow
            for column in (*wanted.keys, *wanted.fields):
                if not _has(schema, column):
                    raise _no_column(name, [column], "it", dict.fromkeys(schema.names))
            columns = sorted({*wanted.keys, *wanted.fields})
            row = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield _columns(batch, f"{name}, row {{}}", row, wanted, notes)
                row += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RequestError(f"join table {name}: it cannot be read as parquet: {error}") from error


def _has(schema: pa.Schema, column: str) -> bool:
    """Whether a column is there, by its name or a dotted one."""
    if column in schema.names:
        return True
    first, *rest = column.split(".")
    kind = schema.field(first).type if first in schema.names else None
    for part in rest:
        if kind is None or not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return kind is not None


def _column(batch: pa.RecordBatch, column: str) -> pa.Array:
    if column in batch.schema.names:
        return batch.column(column)
    first, *rest = column.split(".")
    return pc.struct_field(batch.column(first), rest)


def _columns(batch: pa.RecordBatch, where: str, first: int, wanted: Wanted, notes: Notes) -> pa.RecordBatch:
    """The key and the fields of a batch; rows without a key or that cannot be read are left out."""
    bad: dict[int, str] = {}
    arrays = [_plain(_column(batch, column), bad) for column in wanted.fields]
    keys = _keys([_column(batch, column) for column in wanted.keys], wanted.cut, bad)
    for row, why in sorted(bad.items()):
        notes.bad(where.format(first + row + 1), why)
    mask = keys.is_valid()
    if bad:
        mask = pc.and_(mask, pa.array([row not in bad for row in range(len(batch))]))
    kept = pc.sum(mask).as_py() or 0
    notes.without_key += len(batch) - kept - len(bad)
    notes.took(kept)
    made = pa.record_batch([keys, *arrays], ["key", *(f"f{i}" for i in range(len(arrays)))])
    return made if kept == len(batch) else made.filter(mask)


def _keys(parts: list[pa.Array], cut: Callable[[str], str] | None, bad: dict[int, str]) -> pa.Array:
    if cut is None and (quick := _quick_keys(parts)) is not None:
        return quick
    made: list[str | None] = []
    for row, values in enumerate(zip(*(_python(part, bad) for part in parts), strict=True)):
        try:
            made.append(_key(values, cut))
        except ValueError as error:
            bad.setdefault(row, str(error))
            made.append(None)
    return pa.array(made, pa.string())


def _quick_keys(parts: list[pa.Array]) -> pa.Array | None:
    """Keys without a look at each, where nothing needs one: whole numbers and short strings, none of them empty."""
    texts = []
    for part in parts:
        kind = part.type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            return None
        try:
            part.validate(full=True)
        except pa.ArrowInvalid:
            return None
        text = part.cast(pa.string())
        lengths = pc.min_max(pc.binary_length(text)).as_py()
        if lengths["min"] == 0 or (lengths["max"] or 0) > MAX_KEY // (4 * len(parts)):
            return None
        texts.append(text)
    return texts[0] if len(texts) == 1 else pc.binary_join_element_wise(*texts, "/")


def _plain(array: pa.Array, bad: dict[int, str]) -> pa.Array:
    """Strings, numbers and booleans as they are, times as text, everything else as JSON text."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if pa.types.is_float16(kind):
        return array.cast(pa.float32())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return array
    if pa.types.is_null(kind) or pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return array.cast(pa.string())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        values: list[Any] | None = None
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            values = _python(array, bad)
        longest = pc.max(pc.binary_length(array.cast(pa.large_binary()))).as_py() or 0
        if values is None and longest <= MAX_VALUE:
            return array.cast(pa.string())
    texts: list[str | None] = []
    for row, value in enumerate(_python(array, bad) if values is None else values):
        text = value if value is None or isinstance(value, str) else json.dumps(value, default=str)
        if text is not None and len(text) > MAX_VALUE:
            bad.setdefault(row, f"a value of {len(text)} characters, at most {MAX_VALUE} are taken")
            text = None
        texts.append(text)
    return pa.array(texts, pa.string())


def _python(array: pa.Array, bad: dict[int, str]) -> list[Any]:
    """The values; those with strings that are no UTF-8 are noted, and None here."""
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        values: list[Any] = []
        for row, value in enumerate(array):
            try:
                values.append(value.as_py())
            except UnicodeDecodeError as error:
                bad.setdefault(row, str(error))
                values.append(None)
        return values


# -- all -------------------------------------------------------------------------------------------------------------


def _no_column(name: str, columns: Iterable[str], what: str, found: Iterable[str]) -> RequestError:
    known = ", ".join(list(found)[:20]) or "nothing"
    return RequestError(f"join table {name}: {what} has {' and '.join(columns)}; the columns there are: {known}")


READERS: Mapping[str, Callable[[Path, str, Wanted, Notes], Iterator[pa.RecordBatch]]] = {
    "parquet": read_parquet,
    "jsonl": read_jsonl,
    "tar_txt": read_tar_txt,
    "tar_jsonl": read_tar_jsonl,
}
