"""Make the sources that a config asks for."""

from pathlib import Path
from typing import TYPE_CHECKING

from microdit.pipeline.sources.source import Source

if TYPE_CHECKING:
    from microdit.pipeline.config.build import BuildConfig
    from microdit.pipeline.config.sources import SourceOptions


def sources_of(config: "BuildConfig") -> list[Source]:
    """The sources of a config.

    Raises:
        RequestError: a list that is not there, or cannot be read.
    """
    from microdit.pipeline.files.download import scratch_folder

    scratch = scratch_folder(config.resources.scratch)
    return [_source(name, options, scratch, config) for name, options in config.sources.items()]


def _source(name: str, options: "SourceOptions", scratch: Path, config: "BuildConfig") -> Source:
    from microdit.pipeline.config import sources as given

    match options:
        case given.UrlsSource():
            from microdit.pipeline.sources.adapters.urls import Urls

            return Urls(name, options.list, options.unit_inputs, options.fetch, options.limit, options.license)
        case given.OpenmojiSource():
            from microdit.pipeline.sources.openmoji.source import Openmoji

            return Openmoji(name, options)
        case given.Sa1bSource():
            from microdit.pipeline.sources.adapters.sa1b import Sa1b

            return Sa1b(name, options, scratch)
        case given.Cc12mSource():
            from microdit.pipeline.sources.adapters.cc12m import Cc12m

            return Cc12m(name, options, scratch)
        case given.JourneydbSource():
            from microdit.pipeline.sources.adapters.journeydb import Journeydb

            return Journeydb(name, options, scratch)
        case given.DiffusiondbSource():
            from microdit.pipeline.sources.adapters.diffusiondb import Diffusiondb

            return Diffusiondb(name, options, scratch, config.images.min_side)
        case given.TextcapsSource():
            from microdit.pipeline.sources.adapters.textcaps import Textcaps

            return Textcaps(name, options, scratch)
        case given.CocoSource():
            from microdit.pipeline.sources.adapters.coco import Coco

            return Coco(name, options, scratch)
        case given.WebdatasetSource():
            from microdit.pipeline.sources.adapters.webdataset import Webdataset

            return Webdataset(name, options, scratch)
        case given.ParquetSource():
            from microdit.pipeline.sources.adapters.parquet import Parquet

            return Parquet(name, options, scratch)
