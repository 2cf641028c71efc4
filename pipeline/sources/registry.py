"""Make the sources that a config asks for."""

from pathlib import Path

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.layouts import FolderSource, JsonlSource, ParquetSource, TfrecordSource, WebdatasetSource
from microdit.pipeline.config.sources import (
    Cc12mSource,
    CocoSource,
    DiffusiondbSource,
    Img2datasetSource,
    JourneydbSource,
    OpenmojiSource,
    Sa1bSource,
    SourceOptions,
    TextcapsSource,
    UrlsSource,
)
from microdit.pipeline.files.scratch import scratch_folder
from microdit.pipeline.sources.adapters.cc12m import Cc12m
from microdit.pipeline.sources.adapters.coco import Coco
from microdit.pipeline.sources.adapters.diffusiondb import Diffusiondb
from microdit.pipeline.sources.adapters.folder import Folder
from microdit.pipeline.sources.adapters.img2dataset import Img2dataset
from microdit.pipeline.sources.adapters.journeydb import Journeydb
from microdit.pipeline.sources.adapters.jsonl import Jsonl
from microdit.pipeline.sources.adapters.parquet import Parquet
from microdit.pipeline.sources.adapters.sa1b import Sa1b
from microdit.pipeline.sources.adapters.textcaps import Textcaps
from microdit.pipeline.sources.adapters.tfrecord import Tfrecord
from microdit.pipeline.sources.adapters.urls import Urls
from microdit.pipeline.sources.adapters.webdataset import Webdataset
from microdit.pipeline.sources.openmoji.source import Openmoji
from microdit.pipeline.sources.source import Source


def sources_of(config: BuildConfig) -> list[Source]:
    """Make the sources of a config.

    Raises:
        RequestError: a list that is not there, or cannot be read.
    """
    return [source_of(config, name) for name in config.sources]


def source_of(config: BuildConfig, name: str) -> Source:
    """Make one source of a config. Raises as `sources_of`."""
    return _source(name, config.sources[name], scratch_folder(config.resources.scratch), config)


def _source(name: str, options: SourceOptions, scratch: Path, config: BuildConfig) -> Source:
    match options:
        case UrlsSource():
            return Urls(name, options.list, options.unit_inputs, options.fetch, options.limit, options.license)
        case OpenmojiSource():
            return Openmoji(name, options)
        case Sa1bSource():
            return Sa1b(name, options, scratch)
        case Cc12mSource():
            return Cc12m(name, options, scratch)
        case JourneydbSource():
            return Journeydb(name, options, scratch)
        case DiffusiondbSource():
            return Diffusiondb(name, options, scratch, config.images.min_side)
        case TextcapsSource():
            return Textcaps(name, options, scratch)
        case CocoSource():
            return Coco(name, options, scratch)
        case WebdatasetSource():
            return Webdataset(name, options, scratch)
        case Img2datasetSource():
            return Img2dataset(name, options, scratch)
        case ParquetSource():
            return Parquet(name, options, scratch)
        case FolderSource():
            return Folder(name, options, scratch)
        case JsonlSource():
            return Jsonl(name, options, scratch)
        case TfrecordSource():
            return Tfrecord(name, options, scratch)
