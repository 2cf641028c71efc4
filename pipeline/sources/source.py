"""Define what a source of images is: it is cut into units, and reading a unit gives every input of it, in order."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from microdit.pipeline.corpus.corpus import Corpus

Fields = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Input:
    """One input of a unit: its bytes, or the reason why there are none, or neither if it was not wanted."""

    ordinal: int
    """Its number in the unit, from 0."""
    key: str
    data: bytes | None
    origin: str = ""
    caption: str = ""
    license: str = ""
    fields: Fields = field(default_factory=dict)
    """The source's own values of the sample: further captions, scores, ids."""
    reason: str | None = None
    detail: str = ""
    sha256: str = ""
    """Hash of the bytes, also if `data` was not wanted; empty where the source may have others the next time."""


class Source(Protocol):
    """A dataset adapter. Picklable: workers get copies.

    A source with an attribute `fetches_rows = True` asks for each input by itself: one that failed for a transient
    reason may be fetched later. In other sources an input is part of a file, and fails again.
    """

    name: str
    terms: str
    """The licence in one line: its name, who may use it, where to accept it. The first thing that a user sees."""

    def stage(self) -> dict[str, Any]:
        """Declare what the inputs are made by, with a hash of the list."""

    def units(self) -> list[str]:
        """List the names of the units, in order."""

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        """Read exactly one Input per input of the unit, in order; those that are not wanted are not fetched."""

    def running(self, corpus: Corpus, report: Callable[[str], None]) -> AbstractContextManager[None]:
        """Prepare the source, once, by the driver, around all reads; `report` receives lines on the progress."""
