"""Where images come from. A source is cut into units; reading a unit gives every input of it, in order."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pipeline.config import BuildConfig
    from pipeline.corpus import Corpus
    from pipeline.source_options import SourceOptions

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


def sources_of(config: "BuildConfig") -> list[Source]:
    """The sources of a config.

    Raises:
        RequestError: a list that is not there, or cannot be read.
    """
    from pipeline.sources.remote import scratch_folder

    scratch = scratch_folder(config.resources.scratch)
    return [_source(name, options, scratch, config) for name, options in config.sources.items()]


def _source(name: str, options: "SourceOptions", scratch: Path, config: "BuildConfig") -> Source:
    from pipeline import source_options as given

    match options:
        case given.UrlsSource():
            from pipeline.sources.urls import Urls

            return Urls(name, options.list, options.unit_inputs, options.fetch, options.limit, options.license)
        case given.OpenmojiSource():
            from pipeline.sources.openmoji import Openmoji

            return Openmoji(name, options)
        case given.Sa1bSource():
            from pipeline.sources.sa1b import Sa1b

            return Sa1b(name, options, scratch)
        case given.Cc12mSource():
            from pipeline.sources.cc12m import Cc12m

            return Cc12m(name, options, scratch)
        case given.JourneydbSource():
            from pipeline.sources.journeydb import Journeydb

            return Journeydb(name, options, scratch)
        case given.DiffusiondbSource():
            from pipeline.sources.diffusiondb import Diffusiondb

            return Diffusiondb(name, options, scratch, config.images.min_side)
        case given.TextcapsSource():
            from pipeline.sources.textcaps import Textcaps

            return Textcaps(name, options, scratch)
        case given.CocoSource():
            from pipeline.sources.coco import Coco

            return Coco(name, options, scratch)
        case given.WebdatasetSource():
            from pipeline.sources.webdataset import Webdataset

            return Webdataset(name, options, scratch)
        case given.ParquetSource():
            from pipeline.sources.parquet import Parquet

            return Parquet(name, options, scratch)
