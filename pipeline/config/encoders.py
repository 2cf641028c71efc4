"""Options of `latents/*` and `text/*` columns."""

from typing import Literal

from pydantic import Field, model_validator

from microdit.pipeline.config.block import FieldError, Options


class LatentsColumn(Options):
    """`latents/<name>`."""

    autoencoder: str
    """A name of `microdit.model.pretrained.autoencoder`, a folder, or a hub repository."""
    revision: str | None = None
    """A hub revision; by default the one that the registry fixes, else the newest."""
    resolution: int = Field(ge=8, le=4096)
    """Pixels of a side: the image is resized and cropped to this square before it is encoded."""
    posterior: Literal["sample", "mode", "moments"] = "sample"
    """A sample of the posterior, seeded by key and column; its mode; or its means and standard deviations, twice the
    channels, of which the trainer draws another sample each time."""


class TextColumn(Options):
    """`text/<name>@<captions>`: the captions column that it embeds follows the @."""

    encoder: str
    """A name of `microdit.model.pretrained.text`, a folder, or a hub repository."""
    revision: str | None = None
    """A hub revision; by default the one that the registry fixes, else the newest."""
    storage: Literal["float16", "int8", "int4"] = "float16"
    """int8 takes half the bytes, int4 a quarter; the loss is measured on one sample in a hundred."""
    max_loss: float | None = Field(default=None, gt=0)
    """The relative error of a quantised sample above which the build stops; by default 0.03 (int8), 0.2 (int4)."""
    trim: bool = False
    """Keep the real tokens of a CLIP text tower, without the embeddings of its padding. The released weights were
    trained on all 77 positions, in float16."""

    @model_validator(mode="after")
    def _check_max_loss(self) -> "TextColumn":
        if self.max_loss is not None and self.storage == "float16":
            raise FieldError(("max_loss",), "it is for storage int8 and int4: float16 is not quantised", self.max_loss)
        return self
