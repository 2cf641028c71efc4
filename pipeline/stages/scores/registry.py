"""Which stages make the columns `scores/*` of a config."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from microdit.pipeline.config import scores as given
from microdit.pipeline.stages.identity import carried_identity
from microdit.pipeline.stages.scores.caption_text import CaptionQuality
from microdit.pipeline.stages.scores.pixels import BasicScores, PixelScores
from microdit.pipeline.stages.scores.vision import VisionScores
from microdit.pipeline.stages.stage import Stage

if TYPE_CHECKING:
    from microdit.pipeline.config.build import BuildConfig


TEXT_SCALARS = {"area": "float32", "boxes": "int32", "characters": "int32"}


def score_stages(config: "BuildConfig") -> Iterator[Stage]:
    """A stage for each column; one for all columns `clip` of a model.

    Raises:
        RequestError: a model that is not to be had.
    """
    max_pixels, resources = config.images.max_pixels, config.resources
    compared: dict[tuple[str, str | None], dict[str, Any]] = {}
    for name, options in config.columns.items():
        match options:
            case given.BasicScores():
                yield BasicScores(name, max_pixels)
            case given.NsfwScores(model=given.YAHOO):
                stage = {
                    "stage": "scores/nsfw",
                    "version": 1,
                    "name": given.YAHOO,
                    "model": carried_identity(name, given.YAHOO),
                }
                yield PixelScores(name, stage, {"nsfw": "float32"}, max_pixels, _nsfw)
            case given.TextScores():
                stage = {"stage": "scores/text", "version": 1, "model": carried_identity(name, "rapidocr")}
                yield PixelScores(name, stage, TEXT_SCALARS, max_pixels, _text)
            case given.CaptionScores():
                yield CaptionQuality(name, options)
            case given.ClipScores():
                compared.setdefault((options.model, options.revision), {})[name] = options
            case given.NsfwScores() | given.AestheticScores() | given.EmbeddingScores():
                yield VisionScores(name, {name: options}, max_pixels, resources)
    for columns in compared.values():
        yield VisionScores(next(iter(columns)), columns, max_pixels, resources)


def _nsfw() -> Any:
    from microdit.model.pretrained.packaged import NsfwScorer

    return NsfwScorer()


def _text() -> Any:
    from microdit.model.pretrained.packaged import TextScorer

    return TextScorer()
