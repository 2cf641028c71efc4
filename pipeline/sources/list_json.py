"""Read lists of URLs that are JSON lines, an object each; Parquet tables are made into such."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from microdit.pipeline.base.secrets import without_secrets
from microdit.pipeline.sources.joined_fields import nested_value
from microdit.pipeline.sources.list_columns import CAPTION_NAMES, URL_NAMES, ListColumns, ListRow

LOOKED_AT = 100  # rows whose columns are looked at
SHOWN = 40


@dataclass(frozen=True)
class JsonFormat:
    """The columns of JSON lines, dotted inside of objects."""

    url: str
    caption: str = ""
    """Empty: the list has none."""
    more: tuple[tuple[str, str], ...] = ()
    """Further columns by what they are for: `fields.NAME`, `md5`, `sha256`."""

    encoding: ClassVar[str] = "utf-8"
    quoted: ClassVar[bool] = False
    start: ClassVar[int] = 0
    longest: ClassVar[int] = 1 << 20
    """Bytes of a line at most."""

    def stage(self) -> dict[str, Any]:
        """Declare the columns."""
        columns = {"url": self.url, "caption": self.caption, **dict(self.more)}
        return {"format": {"kind": "json", **columns}}

    def parse(self, line: bytes) -> ListRow:
        """Parse a line.

        Raises:
            ValueError: it is no JSON object, or has no URL.
        """
        if len(line) > self.longest:
            raise ValueError(f"the line is longer than {self.longest} bytes")
        shown = without_secrets(line[:4096].decode("utf-8", "replace"))[:80]
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected a JSON object, found {shown!r} ({str(error)[:80]})") from None
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, found {shown!r}")
        url = nested_value(row, self.url)
        if not isinstance(url, str) or not url.strip():
            raise ValueError(f"its {self.url!r} is no URL: {shown!r}")
        caption = nested_value(row, self.caption) if self.caption else ""
        more = {what: nested_value(row, column) for what, column in self.more}
        return ListRow(url.strip(), caption, more)


def is_json(head: bytes) -> bool:
    """Tell whether a list begins with a line that is a JSON object."""
    return bool(_object(head.split(b"\n", 1)[0]))


def _object(line: bytes) -> dict[str, Any]:
    """Parse a line; empty if it is no object."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def find_json_format(head: bytes, columns: ListColumns) -> JsonFormat:
    """Find the columns by the first lines.

    Raises:
        ValueError: there is no such column, or it is open which one is meant.
    """
    rows = [row for line in head.split(b"\n")[:LOOKED_AT] if (row := _object(line))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    known = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    for what, column in (("url", columns.url), ("caption", columns.caption), *columns.more):
        if isinstance(column, int):
            raise ValueError(f"{what}: {column}: its columns have names ({known}); expected one of them")
        if column and not any(column in row or nested_value(row, column) is not None for row in rows):
            raise ValueError(f"its first {len(rows)} lines have no {column!r}; expected one of {known}")
    url = columns.url or _named(names, URL_NAMES)
    caption = columns.caption if columns.caption is not None else _named(names, CAPTION_NAMES)
    for what, found in (("url", url), ("caption", caption)):
        if found is None:
            raise ValueError(
                f"which column is the {what} is open; expected the option {what}, with one of {known}"
                + (", or empty for none" if what == "caption" else "")
            )
    more = tuple((what, str(column)) for what, column in columns.more)
    return JsonFormat(str(url), str(caption), more)


def _named(names: list[str], known: tuple[str, ...]) -> str | None:
    """Find the column that is called as such columns are."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)
