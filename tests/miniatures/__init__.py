"""Miniatures of the published datasets: as the layouts in `tests/data/layouts` say, file by file and member by member.

They are made without a look at the adapters: what these read must be what the layouts tell. All files of a dataset are
in the listings, under their own names; a few of the units hold samples, the others are valid and empty.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.miniatures.pictures import Picture

LAYOUTS = Path(__file__).parent.parent / "data" / "layouts"
ABOUT = {".gitattributes": b"*.tar filter=lfs diff=lfs merge=lfs -text\n", "LICENSE": b""}
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Expected:
    """The expected row of a sample: a caption, fields and a picture, or the reason why there is none.

    Texts are as the data set has them; in a corpus a text is one line, with single spaces between its words.
    """

    unit: str
    """Name of its file in the listing."""
    member: str
    """Name of its image in the archive, or its number in a table."""
    caption: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    picture: Picture | None = None
    reason: str = ""

    @property
    def path(self) -> str:
        return f"{self.unit}/{self.member}"


@dataclass(frozen=True)
class Repository:
    """A dataset on the hub. `branches`: the files of other branches than `main`."""

    files: Mapping[str, bytes]
    gated: bool = False
    revision: str | None = None
    branches: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Miniature:
    """All files that a dataset's adapter can request, and the expected rows. `urls`: files at plain addresses."""

    expected: list[Expected]
    repositories: Mapping[str, Repository] = field(default_factory=dict)
    urls: Mapping[str, bytes] = field(default_factory=dict)


@cache
def layout(name: str) -> dict[str, Any]:
    """Read a layout file; cached, so it must not be changed."""
    found: dict[str, Any] = yaml.safe_load((LAYOUTS / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def expand(pattern: str) -> Iterator[str]:
    """Expand `x-{0000..0099}.tar` to names; numbers are padded if the first one is."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    width = len(first) if first.startswith("0") and len(first) == len(last) else 0
    for number in range(int(first), int(last) + 1):
        yield f"{pattern[: match.start()]}{number:0{width}d}{pattern[match.end() :]}"


def beside(names: list[str], title: str) -> dict[str, bytes]:
    """List the files of a repository that are no data."""
    return {name: ABOUT.get(name, f"# {title}\n".encode()) for name in names}
