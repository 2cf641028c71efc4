"""The columns of the view as the page shows them: a number, a category, a text or a flag, by group."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Declaration
from microdit.pipeline.curation.job import CONTAMINATED
from microdit.pipeline.tables.sample_table import JOB_COLUMNS, view_columns

TEXTS = {  # scalars that are different for nearly every sample
    *("id", "key", "unit", "shard", "detail", "caption", "origin", "fields", "sha256"),
    *("pixels_sha256", "phash", "phashes"),
}


@dataclass(frozen=True)
class ShownColumn:
    """A column of the view: its name in SQL, its kind, and how the page calls it."""

    name: str
    kind: str
    """`number`, `category`, `text` or `flag`."""
    label: str
    group: str
    """The column of the corpus that it is from; `tables` of table jobs, `marks` of marks."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def shown_columns(declared: dict[str, Declaration], jobs: Iterable[str]) -> list[ShownColumn]:
    """List the columns of the view.

    Args:
        declared: by name, as the corpus has them.
        jobs: folders of the table jobs whose columns it has.
    """
    columns = []
    for column in view_columns(declared):
        scalar = column.name if column.column == IMAGES else column.field
        columns.append(_shown(column.name, column.type, scalar, column.column))
    for folder in jobs:
        prefix = folder.removeprefix("tables/").removesuffix("s")
        fields = [field for field in JOB_COLUMNS if field.name.startswith(prefix)]
        if folder == CONTAMINATED:
            fields = [pa.field("contaminated", pa.bool_()), *fields]
        for field in fields:
            text = field.name.endswith(("_group", "_by"))
            columns.append(_shown(field.name, field.type, "id" if text else field.name, "tables"))
    if not {"mark", "mark_note"} & {column.name for column in columns}:
        columns.append(ShownColumn("mark", "category", "mark", "marks"))
        columns.append(ShownColumn("mark_note", "text", "note of the mark", "marks"))
    return columns


def _shown(name: str, kind: pa.DataType, scalar: str, group: str) -> ShownColumn:
    if pa.types.is_boolean(kind):
        shown = "flag"
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        shown = "number"
    else:
        shown = "text" if scalar in TEXTS else "category"
    return ShownColumn(name, shown, name.replace("_", " "), group)


def caption_column(declared: dict[str, Declaration]) -> str:
    """Name the column of the view whose text stands under a picture: the source's captions, else others."""
    names = sorted(name for name, one in declared.items() if name.startswith("captions/") and "caption" in one.scalars)
    if not names:
        return "caption" if "caption" in declared[IMAGES].scalars else "key"
    best = "captions/source" if "captions/source" in names else names[0]
    return next(one.name for one in view_columns(declared) if one.column == best and one.field == "caption")
