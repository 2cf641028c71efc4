"""`parquet`: tables with images inside, as many datasets on the hub have them."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RequestError
from pipeline.joins import JoinSpec
from pipeline.source_options import ParquetSource
from pipeline.sources.files import MAX_BYTES, FileSource, Sample
from pipeline.sources.remote import Listing, RemoteFile, list_files
from pipeline.sources.webdataset import as_text, inside, join_specs, plain
from pipeline.watch import alive

BATCH = 16  # rows in memory at once: they may have megabytes each
BUFFER = 1 << 20  # bytes of a column that are read ahead


class Parquet(FileSource):
    """The adapter `parquet`. A column's name may have dots for what is inside of structs."""

    adapter = "parquet"

    def __init__(self, name: str, options: ParquetSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options

    def listing(self) -> Listing:
        return list_files(self._options.files, f"sources.{self.name}.files")

    def details(self) -> dict[str, Any]:
        return self._options.model_dump(include={"image", "caption", "fields", "key"}) | {
            "joins": [join.by for join in self._options.joins]
        }

    def tables(self) -> Sequence[JoinSpec]:
        return self._tables

    @cached_property
    def _tables(self) -> list[JoinSpec]:
        return join_specs(self._options.joins, self.name)

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[Sample]:
        row = 0
        try:
            # a page at a time: the images of a whole row group may be gigabytes
            with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as table:
                image, columns = self._columns(table.schema_arrow, file.name)
                for batch in table.iter_batches(BATCH, columns=columns, use_threads=False):
                    alive()
                    for values in batch.to_pylist():
                        yield self._sample(values, image, row)
                        row += 1
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            detail = f"{error} (behind row {row - 1})" if row else str(error)
            yield Sample("", None, reason="damaged_archive", detail=" ".join(detail.split())[:300])

    def _sample(self, values: dict[str, Any], image: str, row: int) -> Sample:
        options = self._options
        fields = {name: plain(inside(values, column)) for name, column in options.fields.items()}
        key = "" if options.key is None else str(inside(values, options.key) or "")
        origin = key or f"row-{row}"
        for i, join in enumerate(options.joins):
            fields |= self.table(i).get(key if join.by == "key" else origin) or {}
        fields = {name: value for name, value in fields.items() if value is not None}
        caption = as_text(inside(values, options.caption)) if options.caption else ""
        data = inside(values, image)
        data = data.get("bytes") if isinstance(data, dict) else data
        if not data:
            return Sample(key, None, caption, origin, fields, "missing", f"the column {image!r} is empty there")
        if len(data) > MAX_BYTES:
            detail = f"{len(data)} bytes, at most {MAX_BYTES} are read"
            return Sample(key, None, caption, origin, fields, "too_large", detail)
        return Sample(key, bytes(data), caption, origin, fields)

    def _columns(self, schema: pa.Schema, file: str) -> tuple[str, list[str]]:
        """The column of the images, and all that are read.

        Raises:
            RequestError: one that is asked for is not there, or which one the images are in is not clear.
        """
        options, where = self._options, f"sources.{self.name}"
        named = {"caption": options.caption, "key": options.key, "image": options.image}
        named |= {f"fields.{name}": column for name, column in options.fields.items()}
        for field, column in named.items():
            if column and not _has(schema, column):
                known = ", ".join(schema.names[:40])
                raise RequestError(f"{where}.{field} = {column!r}: {file} has no such column; it has {known}")
        image = options.image
        if image is None:
            found = [field.name for field in schema if _holds_bytes(field.type)]
            if len(found) != 1:
                raise RequestError(
                    f"{where}.image = null: {len(found)} columns of {file} hold bytes ({', '.join(found) or 'none'}); "
                    "name the one with the images"
                )
            image = found[0]
        return image, list(dict.fromkeys([image, *(column for column in named.values() if column)]))


def _has(schema: pa.Schema, column: str) -> bool:
    if column in schema.names:
        return True
    kind: Any = schema
    for part in column.split("."):
        index = kind.get_field_index(part) if isinstance(kind, pa.Schema | pa.StructType) else -1
        if index < 0:
            return False
        kind = kind.field(index).type
    return True


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
