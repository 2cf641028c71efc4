"""Make the stages that a config asks for, and declare their columns."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.captions import CaptionsColumn, pass_key
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.sources import OpenmojiSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.redeclare import declare_column, declare_source
from microdit.pipeline.files.scratch import scratch_folder
from microdit.pipeline.sources.adapters.urls import Urls
from microdit.pipeline.sources.file_source import FileSource
from microdit.pipeline.sources.openmoji.source import Openmoji
from microdit.pipeline.sources.source import Source
from microdit.pipeline.stages.captions.endpoint import Endpoint
from microdit.pipeline.stages.captions.given import GivenCaptions, join_spec, known_join_spec
from microdit.pipeline.stages.captions.tags import Tags
from microdit.pipeline.stages.captions.vision_language import Vlm
from microdit.pipeline.stages.ingest import SCALARS, ingest_stage
from microdit.pipeline.stages.latents import Latents
from microdit.pipeline.stages.scores.registry import score_stages
from microdit.pipeline.stages.stage import Stage
from microdit.pipeline.stages.text import Text
from microdit.pipeline.tables.joins.build import build


def stages_of(config: BuildConfig, corpus: Corpus | None = None) -> list[Stage]:
    """Make the stages of a config's columns; one for all latents, which share the images' decode.

    Args:
        corpus: where a captions table is taken from if its file is gone, and the version of a stage that began a
            column.

    Raises:
        RequestError: a join table or a model that is not there.
    """
    stages: list[Stage] = []
    for name, options in config.columns.items():
        if isinstance(options, CaptionsColumn):
            stages += _caption_stages(name, options, config, corpus)
        elif isinstance(options, TextColumn):
            stages.append(Text(name, options, config.resources.text_batch))
    stages += score_stages(config, corpus)
    latents = {name: options for name, options in config.columns.items() if isinstance(options, LatentsColumn)}
    if latents:
        stages.append(Latents(latents, config.images.max_pixels, config.resources))
    return stages


def _caption_stages(name: str, options: CaptionsColumn, config: BuildConfig, corpus: Corpus | None) -> Iterator[Stage]:
    """Make the stage of a captions column; the columns of one vision-language model share the first one's."""
    max_pixels, resources = config.images.max_pixels, config.resources
    if options.vlm is not None:
        columns = {n: o for n, o in config.columns.items() if isinstance(o, CaptionsColumn) and o.vlm is not None}
        same_model = {n: o for n, o in columns.items() if pass_key(o) == pass_key(options)}
        if next(iter(same_model)) == name:
            yield Vlm(same_model, max_pixels, resources)
    elif options.endpoint is not None:
        yield Endpoint(name, options, max_pixels, resources)
    elif options.tags is not None:
        yield Tags(name, options, max_pixels, resources.decode_threads)
    elif options.join is not None:
        pattern = _openmoji_table(name, options.column, config) if options.join == "openmoji" else str(options.join)
        try:
            spec = join_spec(name, options, pattern)
        except RequestError:
            known = None if corpus is None else known_join_spec(corpus, name, options, pattern)
            if known is None:
                raise
            spec = known
        yield GivenCaptions(name, options, spec)
    else:
        yield GivenCaptions(name, options)


def _openmoji_table(column: str, field: str, config: BuildConfig) -> str:
    """Find the captions table of the demo's source that has this field; `join: openmoji` stands for it."""
    for name, options in config.sources.items():
        if isinstance(options, OpenmojiSource):
            return str(Openmoji(name, options).captions_table(field))
    raise RequestError(
        f"columns.{column}.join = 'openmoji': there is no source with the adapter openmoji; give the path of a table"
    )


def declare(
    corpus: Corpus,
    config: BuildConfig,
    sources: Iterable[Source],
    stages: Iterable[Stage],
    say: Callable[[str], None] = lambda note: None,
    grow: bool = False,
) -> None:
    """Declare the sources and columns of a config, and sort the tables that captions come from into the corpus.

    With `grow`, files that have been added to a source become new units of it.

    Raises:
        RequestError: a source or column of the corpus was made otherwise; a table cannot be read.
    """
    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    for source in sources:
        correctable: Collection[str] = ()
        fixed: Mapping[str, str] = {}
        if isinstance(source, FileSource | Urls):
            source.keep_to_known_files(corpus, grow, say)
        if isinstance(source, FileSource):
            correctable, fixed = source.text_options, source.fixed_options
        made_by = {**source.stage(), "images": ingest_stage(config.images)}
        declare_source(corpus, source.name, made_by, correctable, fixed, say)
    for stage in stages:
        if isinstance(stage, GivenCaptions) and stage.table is not None:
            stage.keep_to_known_table(corpus)
            build(corpus, stage.table, scratch_folder(config.resources.scratch), say)
        for name, spec in stage.columns.items():
            declare_column(corpus, name, spec.stage, spec.scalars, say)
