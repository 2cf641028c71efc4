"""Where images come from. A source is cut into units; reading a unit gives every input of it, in order."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pipeline.config import BuildConfig
    from pipeline.corpus import Corpus

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
    from pipeline import source_options as given
    from pipeline.sources.cc12m import Cc12m
    from pipeline.sources.coco import Coco
    from pipeline.sources.diffusiondb import Diffusiondb
    from pipeline.sources.journeydb import Journeydb
    from pipeline.sources.openmoji import Openmoji
    from pipeline.sources.parquet import Parquet
    from pipeline.sources.remote import scratch_folder
    from pipeline.sources.sa1b import Sa1b
    from pipeline.sources.textcaps import Textcaps
    from pipeline.sources.urls import Urls
    from pipeline.sources.webdataset import Webdataset

    scratch = scratch_folder(config.resources.scratch)
    sources: list[Source] = []
    for name, options in config.sources.items():
        match options:
            case given.UrlsSource():
                whole = (options.list, options.unit_inputs, options.fetch, options.limit, options.license)
                sources.append(Urls(name, *whole))
            case given.OpenmojiSource():
                sources.append(Openmoji(name, options))
            case given.WebdatasetSource():
                sources.append(Webdataset(name, options, scratch))
            case given.ParquetSource():
                sources.append(Parquet(name, options, scratch))
            case given.Sa1bSource():
                sources.append(Sa1b(name, options, scratch))
            case given.Cc12mSource():
                sources.append(Cc12m(name, options, scratch))
            case given.JourneydbSource():
                sources.append(Journeydb(name, options, scratch))
            case given.DiffusiondbSource():
                sources.append(Diffusiondb(name, options, scratch, config.images.min_side))
            case given.TextcapsSource():
                sources.append(Textcaps(name, options, scratch))
            case given.CocoSource():
                sources.append(Coco(name, options, scratch))
            case _:
                raise NotImplementedError(options.adapter)
    return sources
