"""Tell by names and values which column of a data set is the picture and which the caption."""

from collections.abc import Mapping, Sequence
from typing import Any

from microdit.pipeline.sources.list_columns import CAPTION_NAMES, URL_NAMES

CAPTIONS = ("long_caption", "detailed_caption", "input_prompt", "instruction", *CAPTION_NAMES, "txt", "cap")
MAGICS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
MOST_FIELDS = 24
Columns = Mapping[str, Sequence[Any]]


def is_picture(data: object) -> bool:
    """Tell by the first bytes whether these are a picture."""
    if not isinstance(data, bytes):
        return False
    return data.startswith(MAGICS) or data[8:12] == b"WEBP" or data[4:12] in (b"ftypavif", b"ftypavis")


def caption_column(columns: Columns) -> str:
    """Find the column of the captions: a known name or a part of one, else the longest texts; empty if none is."""
    lengths = {name: sum(map(len, texts)) / len(texts) for name, texts in _texts(columns).items()}
    for known in CAPTIONS:
        if known in lengths:
            return known
    named = {name: length for name, length in lengths.items() if any(known in name.lower() for known in CAPTIONS)}
    words = {name: length for name, length in lengths.items() if any(" " in text for text in _texts(columns)[name])}
    best = named or words
    return max(best, key=lambda name: best[name]) if best else ""


def url_column(columns: Columns) -> str:
    """Find the column of the addresses; empty if there is none."""
    texts = _texts(columns)
    found = {name for name in texts if all(text.startswith(("http://", "https://")) for text in texts[name])}
    return next((name for name in URL_NAMES if name in found), min(found, default=""))


def other_fields(columns: Columns, taken: Sequence[str], before: str = "") -> dict[str, str]:
    """Name the plain columns that are neither the picture nor the caption, `MOST_FIELDS` at most."""
    plain = [
        name
        for name, values in columns.items()
        if name not in taken and any(isinstance(value, str | int | float) for value in values) and "." not in name
    ]
    return {name: before + name for name in plain[:MOST_FIELDS]}


def by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into columns, without the nulls."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(str(name), []).extend([] if value is None else [value])
    return columns


def _texts(columns: Columns) -> dict[str, list[str]]:
    """Return the columns that hold texts, or lists of texts."""
    found: dict[str, list[str]] = {}
    for name, values in columns.items():
        flat = [text for value in values for text in (value if isinstance(value, list) else [value])]
        if flat and all(isinstance(text, str) for text in flat):
            found[name] = flat
    return found
