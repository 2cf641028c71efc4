"""Options of `scores/<scorer>` columns, or `scores/<scorer>-<name>` where there are several of one kind."""

from pydantic import model_validator

from microdit.pipeline.config.block import FieldError, Options

YAHOO = "yahoo"


class ScoresColumn(Options):
    """The base of all scorers' options."""


class BasicScores(ScoresColumn):
    """`scores/basic`: size, sharpness, colours and hashes, without a model."""


class TurnedScores(ScoresColumn):
    """`scores/turned`: hashes of the picture without borders, mirrored and rotated, without a model."""


class NsfwScores(ScoresColumn):
    """`scores/nsfw`: the probability that the picture is not safe for work, 0 to 1."""

    model: str = YAHOO
    """`yahoo`, which the extra `scorers` brings along; or an image classifier, as a folder or a hub repository."""
    revision: str | None = None
    """A hub revision; by default the one that the registry fixes, else the newest."""
    label: str | None = None
    """The label of a classifier that is unsafe."""

    @model_validator(mode="after")
    def _check_label(self) -> "NsfwScores":
        if self.model == YAHOO and (self.label is not None or self.revision is not None):
            raise FieldError(
                ("model",), "yahoo has neither label nor revision: they are for models of the hub", self.model
            )
        if self.model != YAHOO and self.label is None:
            raise FieldError(("label",), f"which label of {self.model} is unsafe? Often it is nsfw", self.label)
        return self


class TextScores(ScoresColumn):
    """`scores/text`: the share of the picture that readable text covers."""


class AestheticScores(ScoresColumn):
    """`scores/aesthetic`: an aesthetic score of the picture, on the model's own scale."""

    model: str
    """A folder or a hub repository: a CLIP image tower with the head of LAION's predictor V2, or a classifier."""
    revision: str | None = None
    """A hub revision; by default the one that the registry fixes, else the newest."""
    label: str | None = None
    """The label of a classifier with several whose probability is the score."""


class EmbeddingScores(ScoresColumn):
    """`scores/embedding`: float16 features of unit length."""

    model: str
    """`efficientnet`, which the extra `scorers` brings along; or a vision model, as a folder or a hub repository."""
    revision: str | None = None
    """A hub revision; by default the one that the registry fixes, else the newest."""


class ClipScores(ScoresColumn):
    """`scores/clip`: the cosine of the picture's and the caption's features, -1 to 1."""

    model: str
    """A CLIP or SigLIP, as a folder or a hub repository. Columns of one model share its actor and the pictures."""
    revision: str | None = None
    """A hub revision; by default the one that the registry fixes, else the newest."""
    captions: str
    """The name of the captions column that is compared."""


class CaptionScores(ScoresColumn):
    """`scores/caption`: length, language and repetition of a caption."""

    captions: str
    """The name of the captions column that is scored."""


SCORERS: dict[str, type[ScoresColumn]] = {
    "basic": BasicScores,
    "turned": TurnedScores,
    "nsfw": NsfwScores,
    "text": TextScores,
    "aesthetic": AestheticScores,
    "clip": ClipScores,
    "embedding": EmbeddingScores,
    "caption": CaptionScores,
}


# every class, not the base: a dumped config has the fields of the classes that are named here
AnyScores = (
    BasicScores
    | TurnedScores
    | NsfwScores
    | TextScores
    | AestheticScores
    | ClipScores
    | EmbeddingScores
    | CaptionScores
)


def scorer_of(column: str) -> str:
    """Return the scorer of a column, known or not: `clip` for `scores/clip` and `scores/clip-long`."""
    return column.partition("/")[2].partition("-")[0]


def device_of(options: object) -> str | None:
    """Return the `device` of a scorer's stage."""
    hub_nsfw = isinstance(options, NsfwScores) and options.model != YAHOO
    if hub_nsfw or isinstance(options, AestheticScores | ClipScores | EmbeddingScores):
        return "gpu"
    return "cpu" if isinstance(options, NsfwScores | TextScores | CaptionScores) else None
