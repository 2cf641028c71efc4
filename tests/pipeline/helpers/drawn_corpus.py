"""Corpora of pictures that tiny pipelines draw, made in this process without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.sources.adapters.synthesize import Synthesize
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import UnitTask

COLOURS, THINGS = ["red", "blue"], ["apple", "house", "dog", "boat"]
PROMPTS = {"templates": ["a {colour} {thing}"], "lists": {"colour": COLOURS, "thing": THINGS}}
COUNT = len(COLOURS) * len(THINGS)


def config_of(url: Path, makers: list[dict[str, Any]], **source: Any) -> BuildConfig:
    """Make the config of pictures of eight prompts, 32 pixels large, in two steps."""
    common = {"steps": 2, "size": 32, "batch": 4, "dtype": "float32"}
    options = {"adapter": "synthesize", "prompts": PROMPTS, "prompts_per_unit": 5, **source}
    return BuildConfig.model_validate(
        {
            "name": "drawn",
            "corpus": str(url),
            "shard_samples": 3,
            "sources": {"drawn": {**options, "makers": [{**common, **maker} for maker in makers]}},
            "images": {"min_side": 16, "format": "webp", "quality": 90},
            "resources": {"scratch": str(url.parent / "scratch")},
        }
    )


def source_of(config: BuildConfig) -> Synthesize:
    """Open the source."""
    [source] = sources_of(config)
    assert isinstance(source, Synthesize)
    return source


def draw_all(source: Synthesize, wanted: Callable[[int], bool] = lambda ordinal: True) -> dict[str, Input]:
    """Read all units; the inputs by key."""
    inputs = [item for unit in source.units() for item in source.read(unit, wanted)]
    assert len({item.key for item in inputs}) == len(inputs)
    return {item.key: item for item in inputs}


def build_here(config: BuildConfig, source: Synthesize | None = None) -> Corpus:
    """Declare the source, and ingest its units one after the other."""
    source = source or source_of(config)
    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    declare(corpus, config, [source], stages_of(config))
    for unit in source.units():
        ingest_unit(corpus, source, UnitTask(unit), config)
    return corpus
