"""Make a sample's fields from values of any kind, and from the join tables of its source."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.files import JoinOptions
from microdit.pipeline.content.text_bytes import NotTextError, checked_text
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.members import one_line
from microdit.pipeline.tables.joins.lookup import Joined
from microdit.pipeline.tables.joins.spec import JoinSpec, address_without_extension

Plain = str | int | float | bool | None
READERS = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".jsonl.gz"), "jsonl"),
    ".json": "json",
    **dict.fromkeys((".csv", ".tsv"), "csv"),
}


def plain(value: object) -> Plain:
    """Convert a value to what a field can hold: lists and objects to JSON, NaN to None, dates to text.

    Raises:
        NotTextError: a text that is none.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return checked_text(value)
    if isinstance(value, Plain):
        return value
    if isinstance(value, list | dict):
        return checked_text(json.dumps(value, ensure_ascii=False, default=str))
    return str(value)


def fields_of(values: Iterable[tuple[str, object]], faults: dict[str, str] | None = None) -> dict[str, Plain]:
    """Make fields of named values, without the empty ones, and without texts that are none: `faults` says which."""
    fields: dict[str, Plain] = {}
    for name, value in values:
        try:
            if (converted := plain(value)) is not None and converted != "":
                fields[name] = converted
        except NotTextError as error:
            if faults is not None:
                faults[name] = str(error)
    return fields


def tables_of(
    source: str, joins: Sequence[JoinOptions], archives: Listing, list_table: Callable[[str, str], Listing]
) -> list[JoinSpec]:
    """Specify the join tables of a source's `joins`, in their order.

    The rows of a table's file belong to the archive beside it alone, by default if every file of the table has one.

    Raises:
        RequestError: a pattern matches nothing, or files that are no tables.
    """
    specs = []
    addresses = {address_without_extension(file.url) for file in archives.files}
    for number, join in enumerate(joins):
        what = f"sources.{source}.joins.{number}.file"
        listing = list_table(join.file, what)
        readers = {reader for file in listing.files for end, reader in READERS.items() if file.name.endswith(end)}
        others = [file.name for file in listing.files if not file.name.endswith(tuple(READERS))]
        if others or len(readers) > 1:
            is_there = f"found {others[0]}" if others else "found several kinds"
            raise RequestError(f"{what} = {join.file!r}: expected {', '.join(READERS)} files of one kind; {is_there}")
        apart = [file.name for file in listing.files if address_without_extension(file.url) not in addresses]
        if apart and join.rows_of == "beside":
            raise RequestError(
                f"sources.{source}.joins.{number}.rows_of = 'beside': no file of this source lies beside {apart[0]}; "
                "expected one of the same folder and name for every file of the table"
            )
        beside = join.rows_of == "beside" or (join.rows_of is None and not apart and len(archives.files) > 1)
        what = what.removesuffix(".file")
        specs.append(JoinSpec(listing, readers.pop(), join.key, join.fields, what=what, beside=beside))
    return specs


def declared_later(texts: str, joins: Sequence[JoinOptions]) -> dict[str, Any]:
    """Declare options that sources of earlier versions did not have, if they are given."""
    declared: dict[str, Any] = {} if texts == "first" else {"texts": texts}
    if any(join.rows_of for join in joins):
        declared["rows_of"] = [join.rows_of for join in joins]
    return declared


def nested_value(values: Any, name: str) -> Any:
    """Return the value of a dotted name in nested dicts; None if it is absent."""
    if isinstance(values, dict) and name in values:
        return values[name]
    first, dot, rest = name.partition(".")
    return nested_value(values.get(first), rest) if dot and isinstance(values, dict) else None


def as_text(value: Any, faults: dict[str, str], texts: str = "first") -> str:
    """Put a caption on one line; of a list of them the first that is not empty, the `longest`, or all (`join`).

    Empty if it is no text; what is wrong with it is noted in `faults["caption"]`.
    """
    if not isinstance(value, list):
        return one_line(value, "caption", faults)
    lines = [line for one in value if (line := one_line(one, "caption", faults))]
    if lines and texts != "join":
        lines = [lines[0] if texts == "first" else max(lines, key=len)]
    if lines:
        faults.pop("caption", None)
    return " ".join(lines)


def joined(
    joins: Sequence[JoinOptions],
    specs: Sequence[JoinSpec],
    table: Callable[[int], Joined],
    file: RemoteFile,
    key: str,
    origin: str,
) -> dict[str, Plain]:
    """Look a sample up in the tables; no fields if it is absent.

    Args:
        file: the archive with the sample.
        key: as the dataset has it.
        origin: the member or row of the file.
    """
    fields: dict[str, Plain] = {}
    for number, (join, spec) in enumerate(zip(joins, specs, strict=True)):
        if (prefix := spec.prefix(file.url)) is not None:
            row = table(number).get(prefix + (key if join.by == "key" else origin))
            fields |= fields_of((row or {}).items())
    return fields
