"""Make the stages of the columns `scores/*` of a config."""

from collections.abc import Iterator

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.scores import (
    YAHOO,
    AestheticScores,
    BasicScores,
    CaptionScores,
    ClipScores,
    EmbeddingScores,
    NsfwScores,
    TextScores,
    TurnedScores,
)
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.stages.identity import carried_identity
from microdit.pipeline.stages.row_stage import RowStage
from microdit.pipeline.stages.scores.caption_text import caption_score_stage
from microdit.pipeline.stages.scores.pixels import PixelFunction, basic_score_stage, pixel_score_stage
from microdit.pipeline.stages.scores.turned import NESTED, VERSION, turned_score_stage
from microdit.pipeline.stages.scores.vision import VisionScores
from microdit.pipeline.stages.stage import ColumnSpec, Stage

NSFW_SCALARS = {"nsfw": "float32"}
TEXT_SCALARS = {"area": "float32", "boxes": "int32", "characters": "int32"}


def score_stages(config: BuildConfig, corpus: Corpus | None = None) -> Iterator[Stage]:
    """Make a stage for each column; one for all columns `clip` of a model.

    Args:
        corpus: where a column is that an earlier version of a stage began; that version goes on with it.

    Raises:
        RequestError: a model that is not to be had.
    """
    max_pixels, resources = config.images.max_pixels, config.resources
    by_clip: dict[tuple[str, str | None], dict[str, ClipScores]] = {}
    for name, options in config.columns.items():
        match options:
            case BasicScores():
                yield basic_score_stage(name, max_pixels)
            case TurnedScores():
                yield turned_score_stage(name, max_pixels, _turned_version(corpus, name))
            case NsfwScores(model=model) if model == YAHOO:
                yield _nsfw_stage(name, max_pixels)
            case TextScores():
                yield _text_stage(name, max_pixels)
            case CaptionScores():
                yield caption_score_stage(name, options)
            case ClipScores():
                by_clip.setdefault((options.model, options.revision), {})[name] = options
            case NsfwScores() | AestheticScores() | EmbeddingScores():
                yield VisionScores(name, {name: options}, max_pixels, resources)
    for columns in by_clip.values():
        yield VisionScores(next(iter(columns)), columns, max_pixels, resources)


def _turned_version(corpus: Corpus | None, name: str) -> int:
    if corpus is None or name not in corpus.columns():
        return VERSION
    version = corpus.column(name).made_by.get("version")
    return version if version in NESTED else VERSION


def _nsfw_stage(name: str, max_pixels: int) -> RowStage:
    stage = {"stage": "scores/nsfw", "version": 1, "name": YAHOO, "model": carried_identity(name, YAHOO)}
    return pixel_score_stage(name, ColumnSpec(stage, NSFW_SCALARS, (IMAGES,)), "cpu", max_pixels, _load_nsfw)


def _text_stage(name: str, max_pixels: int) -> RowStage:
    stage = {"stage": "scores/text", "version": 1, "model": carried_identity(name, "rapidocr")}
    return pixel_score_stage(name, ColumnSpec(stage, TEXT_SCALARS, (IMAGES,)), "cpu", max_pixels, _load_text)


def _load_nsfw() -> PixelFunction:
    from microdit.model.pretrained.packaged import NsfwScorer

    return NsfwScorer()


def _load_text() -> PixelFunction:
    from microdit.model.pretrained.packaged import TextScorer

    return TextScorer()
