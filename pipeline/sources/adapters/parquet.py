"""`parquet`: Parquet files with images inside."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.config.layouts import ParquetSource
from microdit.pipeline.content.text_bytes import NotTextError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import UNITS
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample
from microdit.pipeline.sources.joined_fields import plain
from microdit.pipeline.sources.mapped_source import MappedSource

ROWS = 16  # read at once: each is an image of 0.1 to 4 MB
BUFFER = 1 << 20  # bytes read ahead; else, or with pre_buffer, a row group is read as a whole, 1 GB and more
COMPARED = 8  # files on this machine whose columns are looked at first
NAMED = 40  # columns in a message
ColumnPath = tuple[str, ...]  # a column, and the struct fields inside of it


@dataclass(frozen=True)
class _Columns:
    """The columns to read of one file: the image's, and the others by option (`key`, `caption`, `fields.NAME`)."""

    image: ColumnPath
    others: Mapping[str, ColumnPath]

    def names(self) -> list[str]:
        return sorted({".".join(path) for path in (self.image, *self.others.values())})


class _DamagedFile(Exception):
    """The file is damaged; the message is Arrow's."""


class Parquet(MappedSource):
    """The adapter `parquet`. Fields: those of the options, and those of the joined tables.

    A row without an image fails (`missing`), as does one with a value that is not of its type (`bad_value`). Where the
    file is damaged, the rest of it is one failed row.
    """

    adapter = "parquet"

    def __init__(self, name: str, options: ParquetSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self.has_names = options.key is not None
        self._others_fit = False

    # -- rows --------------------------------------------------------------------------------------------------------

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        """Read the rows as the base class says.

        Raises:
            RequestError: a column of the options is not in the first file.
            UnreadableError: it is not in another one.
        """
        row = 0
        try:
            self._check_columns(path, file, number)
            for batch, columns in self._batches(path, file):
                alive()
                for index in range(batch.num_rows):
                    yield self._sample(batch, index, columns, row, file)
                    row += 1
        except _DamagedFile as error:
            detail = f"nothing can be read behind row {row}: {error}"
            yield FileSample("", None, origin=f"row-{row}", reason="damaged_archive", detail=detail)

    def _check_columns(self, path: Path, file: RemoteFile, number: int) -> None:
        """Refuse wrong columns: of the first file as options that are wrong, unless they fit another one."""
        try:
            error = self._misfit(path, file)
        except _DamagedFile:
            return  # `_batches` says why
        if error is None:
            return
        if number == next(iter(self._shares)) and not self._others_fit:
            raise error
        raise UnreadableError(f"{error}. Others are as expected: this file alone is set aside") from None

    def _misfit(self, path: Path, file: RemoteFile) -> RequestError | None:
        """Return what is wrong with the columns of a file; None if they are as the options say.

        Raises:
            _DamagedFile: it cannot be read.
        """
        try:
            with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as table:
                self._find_columns(table.schema_arrow, file.name)
        except RequestError as error:
            return error
        except (pa.ArrowException, OSError) as error:
            raise _DamagedFile(str(error)) from error
        return None

    @contextmanager
    def running(self, corpus: Corpus, report: Callable[[str], None]) -> Iterator[None]:
        """Refuse wrong columns before anything is read, by the first files that are on this machine."""
        files = [self._listing.files[number] for number in list(self._shares)[:COMPARED]]
        misfits: dict[str, RequestError | None] = {}
        for file in files:
            if file.url and "://" not in file.url:
                with suppress(_DamagedFile):
                    misfits[file.name] = self._misfit(Path(file.url), file)
        self._others_fit = None in misfits.values() or bool(corpus.committed(UNITS, self.name))
        if (error := misfits.get(files[0].name)) is not None and not self._others_fit:
            raise error
        with super().running(corpus, report):
            yield

    def _batches(self, path: Path, file: RemoteFile) -> Iterator[tuple[pa.RecordBatch, _Columns]]:
        """Read the rows of a file, a few at a time.

        Raises:
            _DamagedFile: the next rows cannot be read.
        """
        try:
            with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as table:
                columns = self._find_columns(table.schema_arrow, file.name)
                names = columns.names()
                for group in range(table.num_row_groups):
                    left = table.metadata.row_group(group).num_rows
                    for batch in table.iter_batches(ROWS, row_groups=[group], columns=names, use_threads=False):
                        yield batch, columns
                        left -= batch.num_rows
                    if left:
                        raise pa.ArrowInvalid(f"row group {group} has {-left:+} rows more than it should have")
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
                raise  # this machine's fault, not the file's
            raise _DamagedFile(" ".join(str(error).split())[:300]) from error

    def _sample(self, batch: pa.RecordBatch, index: int, columns: _Columns, row: int, file: RemoteFile) -> FileSample:
        """Make the sample of row `index` of a batch, which is row `row` of the file."""
        origin = f"row-{row}"
        values: dict[str, object] = {}
        faults: dict[str, str] = {}
        for option, path in columns.others.items():
            try:
                value = _cell(batch, path, index)
                values[option] = None if value is None else value.as_py()
            except UnicodeDecodeError as error:
                faults[option.removeprefix("fields.")] = str(error)
                if option == "key":
                    detail = f"column {'.'.join(path)!r} cannot be read: {error}"
                    return FileSample("", None, origin=origin, reason="bad_value", detail=detail)
            except (ValueError, OverflowError) as error:  # a date before all dates
                detail = f"column {'.'.join(path)!r} cannot be read: {error}"
                return FileSample("", None, origin=origin, reason="bad_value", detail=detail)
        try:
            raw_key = plain(values.get("key"))
        except NotTextError as error:
            return FileSample("", None, origin=origin, reason="bad_value", detail=f"its key is no text: {error}")
        key = "" if raw_key is None else str(raw_key)
        origin = key or origin
        caption, fields = self.caption_and_fields(values, file, key, origin, faults)
        cell = _cell(batch, columns.image, index)
        data = None if cell is None else cell.as_buffer()
        if data is None or not len(data):
            detail = f"column {'.'.join(columns.image)!r} is empty"
            return FileSample(key, None, caption, origin, fields, "missing", detail)
        if len(data) > MAX_BYTES:
            detail = f"{len(data)} bytes, at most {MAX_BYTES} are read"
            return FileSample(key, None, caption, origin, fields, "too_large", detail)
        return FileSample(key, data.to_pybytes(), caption, origin, fields)

    # -- columns -----------------------------------------------------------------------------------------------------

    def _find_columns(self, schema: pa.Schema, file: str) -> _Columns:
        """Find the columns that the options name, and the image's.

        Raises:
            RequestError: a column is absent or of a wrong type, or the image's is not known.
        """
        options = self._options
        named = options.paths()
        if options.key is not None:
            named["key"] = options.key
        others = {}
        for option, column in named.items():
            others[option], kind = self._find(schema, option, column, file)
            if option.startswith("caption") and not option.endswith(".if") and not _is_text(kind):
                would_do = [field.name for field in schema if _is_text(field.type)]
                raise RequestError(
                    f"sources.{self.name}.{option} = {column!r}: that column of {file} is of the type {kind}; expected "
                    f"text or a list of texts, as {', '.join(would_do[:NAMED]) or 'no column of this file'}"
                )
            if _is_binary(kind) or (option == "key" and pa.types.is_nested(kind)):
                raise RequestError(
                    f"sources.{self.name}.{option} = {column!r}: that column of {file} is of the type {kind}; "
                    "expected text or numbers"
                )
        return _Columns(self._find_image(schema, file), others)

    def _find_image(self, schema: pa.Schema, file: str) -> ColumnPath:
        """Find the column of the images: that of the options, or the only one that holds bytes."""
        what = f"sources.{self.name}.image"
        if (column := self._options.image) is not None:
            path, kind = self._find(schema, "image", column, file)
            if (inner := _path_to_bytes(kind)) is None:
                raise RequestError(
                    f"{what} = {column!r}: that column of {file} is of the type {kind}; "
                    "expected bytes, or a struct with bytes in it"
                )
            return (*path, *inner)
        candidates = [(field.name, *inner) for field in schema if (inner := _path_to_bytes(field.type)) is not None]
        if len(candidates) != 1:
            names = ", ".join(path[0] for path in candidates) or f"none of {_list_columns(schema)}"
            raise RequestError(
                f"{what} = null: {len(candidates)} columns of {file} hold bytes ({names}); name the one with the images"
            )
        return candidates[0]

    def _find(self, schema: pa.Schema, option: str, column: str, file: str) -> tuple[ColumnPath, pa.DataType]:
        """Find a column by its name, dotted inside of structs; return its path and its type."""
        index = schema.get_field_index(column)
        if index >= 0:
            return (column,), schema.field(index).type
        path: ColumnPath = tuple(column.split("."))
        kind: Any = schema
        for part in path:
            index = kind.get_field_index(part) if isinstance(kind, pa.Schema | pa.StructType) else -1
            if index < 0:
                raise RequestError(
                    f"sources.{self.name}.{option} = {column!r}: {file} has no such column; "
                    f"it has {_list_columns(schema)}"
                )
            kind = kind.field(index).type
        return path, kind


def _list_columns(schema: pa.Schema) -> str:
    """List the columns as the options name them, or the first of them."""
    names: list[str] = []
    for column in schema:
        inner = [f"{column.name}.{part.name}" for part in column.type] if pa.types.is_struct(column.type) else []
        names += [column.name] if not inner or _path_to_bytes(column.type) is not None else inner
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    """Check for texts and lists of texts; a column of nulls may be one."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or pa.types.is_null(kind))


def _path_to_bytes(kind: pa.DataType) -> ColumnPath | None:
    """Return the path to an image's bytes within a column of this type; None if it can hold none."""
    if _is_binary(kind):
        return ()
    if pa.types.is_struct(kind) and (index := kind.get_field_index("bytes")) >= 0 and _is_binary(kind[index].type):
        return ("bytes",)
    return None


def _cell(batch: pa.RecordBatch, path: ColumnPath, index: int) -> Any:
    """Return the scalar of a row; None where it, or a struct around it, is null."""
    cell = batch.column(path[0])[index]
    for part in path[1:]:
        if not cell.is_valid:
            return None
        cell = cell[part]
    return cell if cell.is_valid else None
