"""More about a sample: values of any kind made into fields, and the tables of a source's `joins`."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import JoinOptions
from microdit.pipeline.files.find import list_files
from microdit.pipeline.sources.members import one_line
from microdit.pipeline.tables.joins.lookup import Joined
from microdit.pipeline.tables.joins.spec import JoinSpec

Plain = str | int | float | bool | None
READERS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl"}


def plain(value: object) -> Plain:
    """A value as a field can hold it: lists and objects as JSON, no NaN (which JSON cannot write), dates as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Plain):
        return value
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def some(values: Iterable[tuple[str, object]]) -> dict[str, Plain]:
    """Named values as fields, without those that say nothing."""
    found = ((name, plain(value)) for name, value in values)
    return {name: value for name, value in found if value is not None and value != ""}


def tables_of(source: str, joins: Sequence[JoinOptions]) -> list[JoinSpec]:
    """The tables of a source's `joins`, in their order.

    Raises:
        RequestError: a pattern stands for nothing, or for files that are no tables.
    """
    specs = []
    for number, join in enumerate(joins):
        what = f"sources.{source}.joins.{number}.file"
        found = list_files(join.file, what)
        readers = {reader for file in found.files for end, reader in READERS.items() if file.name.endswith(end)}
        others = [file.name for file in found.files if not file.name.endswith(tuple(READERS))]
        if others or len(readers) > 1:
            is_there = f"found {others[0]}" if others else "found both"
            raise RequestError(f"{what} = {join.file!r}: expected .parquet, or .jsonl or .jsonl.gz files; {is_there}")
        specs.append(JoinSpec(found, readers.pop(), join.key, join.fields, what=what.removesuffix(".file")))
    return specs


def inside(values: Any, place: str) -> Any:
    """What is at a dotted place inside of dicts; None if nothing is."""
    if isinstance(values, dict) and place in values:
        return values[place]
    first, dot, rest = place.partition(".")
    return inside(values.get(first), rest) if dot and isinstance(values, dict) else None


def as_text(value: Any) -> str:
    """A caption on one line; of a list of captions the first. Empty if it is no text."""
    return one_line(value[0] if isinstance(value, list) and value else value)


def joined(joins: Sequence[JoinOptions], table: Callable[[int], Joined], key: str, origin: str) -> dict[str, Plain]:
    """What the tables say about a sample; nothing if they do not know it.

    Args:
        key: as the dataset has it.
        origin: its place in the file.
    """
    fields: dict[str, Plain] = {}
    for number, join in enumerate(joins):
        row = table(number).get(key if join.by == "key" else origin)
        fields |= some((row or {}).items())
    return fields
