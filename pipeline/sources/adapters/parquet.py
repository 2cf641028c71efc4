"""`parquet`: Parquet files with images inside."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.config.sources import ParquetSource
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSource, Sample
from microdit.pipeline.sources.joined_fields import as_text, joined, plain, some, tables_of
from microdit.pipeline.tables.joins.spec import JoinSpec

ROWS = 16  # read at once: each is an image of 0.1 to 4 MB
BUFFER = 1 << 20  # bytes read ahead; else, or with pre_buffer, a row group is read as a whole, 1 GB and more
NAMED = 40  # columns in a message
Place = tuple[str, ...]  # a column, and the fields inside of it


class Parquet(FileSource):
    """The adapter `parquet`. Fields: those of the options, and those of the joined tables.

    A row without an image fails (`missing`), and one with a value that is none of its type (`bad_value`). What lies
    behind a broken place of a file is one failed row.
    """

    adapter = "parquet"

    def __init__(self, name: str, options: ParquetSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options

    def listing(self) -> Listing:
        return list_files(self._options.files, f"sources.{self.name}.files")

    def details(self) -> dict[str, Any]:
        options = self._options
        by = [join.by for join in options.joins]
        return {**options.model_dump(include={"image", "caption", "fields", "key"}), "joins": by}

    def tables(self) -> Sequence[JoinSpec]:
        return self._tables

    @cached_property
    def _tables(self) -> list[JoinSpec]:
        return tables_of(self.name, self._options.joins)

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[Sample]:
        """As the base's.

        Raises:
            RequestError: a column of the options is not in the file.
        """
        row = 0
        for batch, image, places in self._batches(path, file):
            if isinstance(batch, str):
                detail = f"nothing can be read behind row {row}: {batch}"
                yield Sample("", None, origin=f"row-{row}", reason="damaged_archive", detail=detail)
                return
            alive()
            for at in range(batch.num_rows):
                yield self._sample(batch, at, image, places, row)
                row += 1

    def _batches(
        self, path: Path, file: RemoteFile
    ) -> "Iterator[tuple[pa.RecordBatch | str, Place, dict[str, Place]]]":
        """The rows of a file, a few at a time, and where in them what is; where it is broken what is wrong with it."""
        image: Place = ()
        places: dict[str, Place] = {}
        try:
            with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as table:
                image, places = self._places(table.schema_arrow, file.name)
                columns = sorted(".".join(place) for place in {image, *places.values()})
                for group in range(table.num_row_groups):
                    left = table.metadata.row_group(group).num_rows
                    for batch in table.iter_batches(ROWS, row_groups=[group], columns=columns, use_threads=False):
                        yield batch, image, places
                        left -= batch.num_rows
                    if left:
                        raise pa.ArrowInvalid(f"row group {group} has {-left:+} rows more than it should have")
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
                raise  # this machine's fault, not the file's
            yield " ".join(str(error).split())[:300], image, places

    def _sample(self, batch: pa.RecordBatch, at: int, image: Place, places: dict[str, Place], row: int) -> Sample:
        options, origin = self._options, f"row-{row}"
        values: dict[str, Any] = {}
        for name, place in places.items():
            try:
                value = _cell(batch, place, at)
                values[name] = None if value is None else value.as_py()
            except (ValueError, OverflowError) as error:  # no UTF-8, a date before all dates
                detail = f"column {'.'.join(place)!r} cannot be read: {error}"
                return Sample("", None, origin=origin, reason="bad_value", detail=detail)
        found = plain(values.get("key"))
        key = "" if found is None else str(found)
        origin = key or origin
        fields = some((name, values[f"fields.{name}"]) for name in options.fields)
        fields |= joined(options.joins, self.table, key, origin)
        caption = as_text(values.get("caption"))
        cell = _cell(batch, image, at)
        data = None if cell is None else cell.as_buffer()
        if data is None or not len(data):
            detail = f"column {'.'.join(image)!r} is empty"
            return Sample(key, None, caption, origin, fields, "missing", detail)
        if len(data) > MAX_BYTES:
            detail = f"{len(data)} bytes, at most {MAX_BYTES} are read"
            return Sample(key, None, caption, origin, fields, "too_large", detail)
        return Sample(key, data.to_pybytes(), caption, origin, fields)

    def _places(self, schema: pa.Schema, name: str) -> tuple[Place, dict[str, Place]]:
        """Where in a file the image is, and what else the options name: `key`, `caption`, `fields.<name>`."""
        options = self._options
        given = {f"fields.{field}": column for field, column in options.fields.items()}
        if options.key is not None:
            given["key"] = options.key
        if options.caption:
            given["caption"] = options.caption
        places = {}
        for option, column in given.items():
            places[option], kind = self._find(schema, option, column, name)
            if _is_binary(kind) or (option == "key" and pa.types.is_nested(kind)):
                raise RequestError(
                    f"sources.{self.name}.{option} = {column!r}: that column of {name} is of the type {kind}; "
                    "expected text or numbers"
                )
        return self._image(schema, name), places

    def _image(self, schema: pa.Schema, name: str) -> Place:
        what = f"sources.{self.name}.image"
        if (column := self._options.image) is not None:
            place, kind = self._find(schema, "image", column, name)
            if (inner := _image_in(kind)) is None:
                raise RequestError(
                    f"{what} = {column!r}: that column of {name} is of the type {kind}; "
                    "expected bytes, or a struct with bytes in it"
                )
            return (*place, *inner)
        found = [(column.name, *inner) for column in schema if (inner := _image_in(column.type)) is not None]
        if len(found) != 1:
            names = ", ".join(place[0] for place in found) or f"none of {_some(schema)}"
            raise RequestError(
                f"{what} = null: {len(found)} columns of {name} hold bytes ({names}); name the one with the images"
            )
        return found[0]

    def _find(self, schema: pa.Schema, option: str, column: str, name: str) -> tuple[Place, pa.DataType]:
        """A column by its name, dotted inside of structs, and its type."""
        index = schema.get_field_index(column)
        if index >= 0:
            return (column,), schema.field(index).type
        place: Place = tuple(column.split("."))
        kind: Any = schema
        for part in place:
            index = kind.get_field_index(part) if isinstance(kind, pa.Schema | pa.StructType) else -1
            if index < 0:
                raise RequestError(
                    f"sources.{self.name}.{option} = {column!r}: {name} has no such column; it has {_some(schema)}"
                )
            kind = kind.field(index).type
        return place, kind


def _some(schema: pa.Schema) -> str:
    """The columns as the options name them, or the first of them."""
    names: list[str] = []
    for column in schema:
        inner = [f"{column.name}.{part.name}" for part in column.type] if pa.types.is_struct(column.type) else []
        names += [column.name] if not inner or _image_in(column.type) is not None else inner
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _image_in(kind: pa.DataType) -> Place | None:
    """Where in a column of this type an image's bytes are; None if it is no such column."""
    if _is_binary(kind):
        return ()
    if pa.types.is_struct(kind) and (index := kind.get_field_index("bytes")) >= 0 and _is_binary(kind[index].type):
        return ("bytes",)
    return None


def _cell(batch: pa.RecordBatch, place: Place, at: int) -> Any:
    """The scalar at a place of a row; None where it, or what it is in, is null."""
    cell = batch.column(place[0])[at]
    for part in place[1:]:
        if not cell.is_valid:
            return None
        cell = cell[part]
    return cell if cell.is_valid else None
