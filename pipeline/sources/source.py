"""Where images come from. A source is cut into units; reading a unit gives every input of it, in order."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from microdit.pipeline.corpus.corpus import Corpus


Fields = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Input:
    """One input of a unit: the bytes that came, or the reason why none did, or neither if it was not wanted."""

    ordinal: int
    """Its number in the unit, from 0."""
    key: str
    data: bytes | None
    origin: str = ""
    caption: str = ""
    license: str = ""
    fields: Fields = field(default_factory=dict)
    """The source's own things about the sample: further captions, scores, ids."""
    reason: str | None = None
    detail: str = ""


class Source(Protocol):
    """A dataset adapter. Picklable: workers get copies."""

    name: str
    terms: str
    """The licence in one line: what it is, whom it serves, where it is accepted. The first thing that a user sees."""

    def stage(self) -> dict[str, Any]:
        """What the inputs are made by, for the declaration; includes a hash of the list."""

    def units(self) -> list[str]:
        """The names of the units, in order."""

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        """Exactly one Input per input of the unit, in order; those that are not wanted are not fetched."""

    def running(self, corpus: "Corpus", say: Callable[[str], None]) -> AbstractContextManager[None]:
        """Entered once, by the driver, around everything that reads; `say` tells how far a long preparation is."""
