"""Make the stages that a config asks for, and declare their columns."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.stage import Stage

if TYPE_CHECKING:
    from microdit.pipeline.config.build import BuildConfig
    from microdit.pipeline.config.captions import CaptionsColumn


def stages_of(config: "BuildConfig") -> list[Stage]:
    """The stages that make the columns of a config; one for all latents, which share the images' decode.

    Raises:
        RequestError: a join table or a model that is not there.
    """
    from microdit.pipeline.config.captions import CaptionsColumn
    from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
    from microdit.pipeline.stages.latents import Latents
    from microdit.pipeline.stages.scores.registry import score_stages
    from microdit.pipeline.stages.text import Text

    stages: list[Stage] = []
    latents = {name: options for name, options in config.columns.items() if isinstance(options, LatentsColumn)}
    for name, options in config.columns.items():
        if isinstance(options, CaptionsColumn):
            stages += _captions(name, options, config)
        elif isinstance(options, TextColumn):
            stages.append(Text(name, options, config.resources.text_batch))
    stages += score_stages(config)
    if latents:
        stages.append(Latents(latents, config.images.max_pixels, config.resources))
    return stages


def _captions(name: str, options: "CaptionsColumn", config: "BuildConfig") -> list[Stage]:
    """The stage of a captions column; with the first of those that a model makes in one pass comes that of all."""
    from microdit.pipeline.config.captions import CaptionsColumn, pass_key
    from microdit.pipeline.stages.captions.endpoint import Endpoint
    from microdit.pipeline.stages.captions.given import Captions
    from microdit.pipeline.stages.captions.tags import Tags
    from microdit.pipeline.stages.captions.vision_language import Vlm

    max_pixels, resources = config.images.max_pixels, config.resources
    if options.vlm is not None:
        asked = {n: o for n, o in config.columns.items() if isinstance(o, CaptionsColumn) and o.vlm is not None}
        same = {n: o for n, o in asked.items() if pass_key(o) == pass_key(options)}
        return [Vlm(same, max_pixels, resources)] if next(iter(same)) == name else []
    if options.endpoint is not None:
        return [Endpoint(name, options, max_pixels, resources)]
    if options.tags is not None:
        return [Tags(name, options, max_pixels, resources.decode_threads)]
    return [Captions(name, options, config)]


def declare(corpus: Corpus, config: "BuildConfig", say: Callable[[str], None] = lambda note: None) -> None:
    """Declare all sources and columns of a config, and put the tables that captions come from into the corpus.

    Raises:
        RequestError: one is there and was made otherwise; a list, table or model that is not there.
    """
    from microdit.pipeline.files.download import scratch_folder
    from microdit.pipeline.stages.captions.given import Captions
    from microdit.pipeline.stages.ingest import SCALARS, ingest_stage
    from microdit.pipeline.tables.joins.build import build

    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    for source in sources_of(config):
        corpus.declare_source(source.name, {**source.stage(), "images": ingest_stage(config.images)})
    for stage in stages_of(config):
        if isinstance(stage, Captions) and stage.table is not None:
            build(corpus, stage.table, scratch_folder(config.resources.scratch), say)
        for name, spec in stage.columns.items():
            corpus.declare_column(name, spec.stage, spec.scalars)
