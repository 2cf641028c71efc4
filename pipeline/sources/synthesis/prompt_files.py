"""Read prompts from text, TSV, CSV, JSON lines and Parquet files."""

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.content.text_bytes import MARKS, NotTextError, checked_text
from microdit.pipeline.sources.list_records import merged
from microdit.pipeline.sources.synthesis.prompt_tally import LeftOut, RawPrompt, RawPrompts, shown

NAMES = ("prompt", "caption", "text")
"""The column that is taken if none is named: the first of these that there is, whatever its case."""
KINDS = (".txt", ".tsv", ".csv", ".jsonl", ".parquet")
MAX_LINE = 1 << 20  # characters
BATCH = 4096
LINES_WITHOUT_COLUMN = 100  # read before a column that no line has had is an error
NAMED = 40  # columns in a message


class PromptFile:
    """A file with prompts.

    Args:
        name: for messages.
        what: the option of the config, for messages.
        column: the column with the prompts; None finds it by its name.
        fields: columns of further values, by the field's name.
        first: the number of the file's first row.
    """

    def __init__(
        self, path: Path, name: str, what: str, column: str | None, fields: dict[str, str], first: int, left: LeftOut
    ):
        self._path, self._name, self._what = path, name, what
        self._column, self._fields = column, fields
        self._left = left
        self.next = first
        """The number of the row behind the last one that was read."""

    def read(self) -> RawPrompts:
        """Read the prompts in order; what is none is counted as left out.

        Raises:
            RequestError: the file is damaged, of another kind, or has no such column.
        """
        kind = _kind(self._name)
        if kind not in KINDS:
            raise self._error(f"expected a file as {', '.join(f'*{each}' for each in KINDS)}")
        if kind == ".txt" and (self._column or self._fields):
            raise self._error("it is text without columns; leave column and fields out, or give a table")
        try:
            yield from self._parquet() if kind == ".parquet" else self._from_text(kind)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise self._error(f"it cannot be read behind row {self.next:,} ({first_line(error)})") from None

    def _from_text(self, kind: str) -> RawPrompts:
        with self._path.open("rb") as raw:
            head = raw.read(4)
            raw.seek(0)
            file: Any = gzip.GzipFile(fileobj=raw) if head.startswith(b"\x1f\x8b") else raw
            text = _text_of(file)
            yield from {".txt": self._lines, ".jsonl": self._json_lines}.get(kind, self._table)(text, kind)

    # -- text ---------------------------------------------------------------------------------------------------------
    def _lines(self, text: io.TextIOWrapper, kind: str) -> RawPrompts:
        for line in _lines(text):
            yield from self._prompt(line.rstrip("\r\n"), {})

    def _json_lines(self, text: io.TextIOWrapper, kind: str) -> RawPrompts:
        found, columns, start = False, list[str](), self.next
        for line in _lines(text):
            if not line.strip():
                self.next += 1
                continue
            try:
                row = json.loads(line) if len(line) <= MAX_LINE else None
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                self._leave_out("no_json", f"{shown(line.strip())} is no JSON object")
                continue
            columns = list(row)
            name = self._column or _named(columns)
            found = found or (name is not None and _top(name, columns) in row)
            if not found and self.next - start > LINES_WITHOUT_COLUMN:
                break
            yield from self._prompt(_nested(row, name or ""), row)
        if not found and columns:
            raise self._no_column(columns)

    def _table(self, text: io.TextIOWrapper, kind: str) -> RawPrompts:
        delimiter = "\t" if kind == ".tsv" else ","
        header: list[str] | None = None
        for _, record in merged(((0, line.rstrip("\r\n")) for line in _lines(text)), delimiter):
            try:
                [cells] = csv.reader([record], delimiter=delimiter, strict=True) if record else [[]]
            except (csv.Error, ValueError) as error:
                if kind == ".csv":
                    self._leave_out("no_csv", f"{error}: {shown(record)}")
                    continue
                cells = record.split(delimiter)  # quotes that are part of the text
            if header is None:
                header = [cell.strip() for cell in cells]
                name = self._column or _named(header)
                if name is None or not {*self._fields.values(), name} <= set(header):
                    raise self._no_column(header)
                continue
            row = dict(zip(header, cells, strict=False))
            yield from self._prompt(row.get(name or "") if cells else "", row)

    # -- Parquet ------------------------------------------------------------------------------------------------------
    def _parquet(self) -> RawPrompts:
        with pq.ParquetFile(self._path) as file:
            names = file.schema_arrow.names
            name = self._column or _named(names)
            if name is None or not (columns := {_top(each, names) for each in {*self._fields.values(), name}}) <= {
                *names
            }:
                raise self._no_column(names)
            for batch in file.iter_batches(BATCH, columns=sorted(columns), use_threads=False):
                for row in _rows(batch):
                    yield from self._prompt(_nested(row, name), row)

    # -- of all -------------------------------------------------------------------------------------------------------
    def _prompt(self, value: object, row: dict[str, Any]) -> Iterator[RawPrompt]:
        """Yield a prompt, or count why there is none; a blank line is passed over."""
        place, number = f"row {self.next + 1:,} of {self._name}", self.next
        if isinstance(value, str) and not value.strip():
            self.next += 1
            return
        if not isinstance(value, str):
            self._leave_out("no_prompt", f"{shown(str(value))} is no text")
            return
        try:
            checked_text(value)
            if "\ufffd" in value:
                raise NotTextError("characters are damaged")
        except NotTextError as error:
            self._leave_out("not_text", f"{error}; expected UTF-8, or a byte order mark")
            return
        self.next += 1
        values = {name: _scalar(_nested(row, column)) for name, column in self._fields.items()}
        fields = {name: scalar for name, scalar in values.items() if scalar is not None}
        yield RawPrompt(number, " ".join(value.split()), fields, place)

    def _leave_out(self, reason: str, example: str) -> None:
        self.next += 1
        self._left.add(reason, f"row {self.next:,} of {self._name}: {example}")

    def _no_column(self, columns: Sequence[str]) -> RequestError:
        wanted = [*([] if self._column is None else [self._column]), *self._fields.values()]
        missing = [name for name in wanted if _top(name, columns) not in columns]
        expected = f"no column {', '.join(map(repr, missing))}" if missing else f"no column {' or '.join(NAMES)}"
        have = ", ".join(map(str, columns[:NAMED])) or "none"
        return self._error(f"it has {expected} (it has: {have}); name one of them in column")

    def _error(self, message: str) -> RequestError:
        return RequestError(f"{self._what}: {self._name}: {message}")


def is_prompt_file(name: str) -> bool:
    """Tell by a file's name whether it can have prompts."""
    return _kind(name) in KINDS


def _kind(name: str) -> str:
    """Return the kind of a file, as in `KINDS` if it is one of them."""
    stem, _, last = name.lower().rpartition(".")
    unpacked = stem.rpartition(".")[2] if last == "gz" else last
    return f".{unpacked}.gz" if last == "gz" and unpacked == "parquet" else f".{unpacked}"


def _text_of(file: Any) -> io.TextIOWrapper:
    buffered = io.BufferedReader(file)
    head = buffered.peek(4)[:4]
    mark, encoding = next(((mark, name) for mark, name in MARKS if head.startswith(mark)), (b"", "utf-8"))
    buffered.read(len(mark))
    errors = "surrogateescape" if encoding == "utf-8" else "replace"
    return io.TextIOWrapper(buffered, encoding, errors, newline="\n")


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    """Read lines; of one longer than `MAX_LINE` what is behind that is passed over."""
    while line := text.readline(MAX_LINE + 1):
        rest = line
        while not rest.endswith("\n") and (rest := text.readline(MAX_LINE)):
            pass
        yield line


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Convert a batch to dictionaries; bytes that are no UTF-8 become a text that is none."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        columns = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                values = column.cast(pa.large_binary()).to_pylist()
                columns[name] = [v if v is None else v.decode("utf-8", "surrogateescape") for v in values]
            else:
                columns[name] = column.to_pylist()
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows


def _named(columns: Sequence[str]) -> str | None:
    """Find the column of the prompts by its name."""
    lower = {str(name).lower(): str(name) for name in reversed(columns)}
    return next((lower[name] for name in NAMES if name in lower), None)


def _top(name: str, columns: Sequence[str]) -> str:
    """Return the column that a name is, or that a dotted name is inside of."""
    return name if name in columns else name.split(".")[0]


def _nested(row: Any, name: str) -> Any:
    """Return the value of a name, or of a dotted one inside of others; None if it is absent."""
    if isinstance(row, dict) and name in row:
        return row[name]
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _scalar(value: Any) -> str | int | float | None:
    """Return a value as a field may have it: other ones as JSON, numbers that are none not at all."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()
