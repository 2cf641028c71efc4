"""Options of the source `synthesize`: prompts, and the models that make pictures of them."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from microdit.pipeline.config.block import FieldError, Options
from microdit.pipeline.config.prompts import PromptsConfig

MAKER = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")


class LoraOptions(Options):
    """A LoRA that is loaded into a maker's model; it needs the package `peft`."""

    model: str
    """A folder, or a repository on the hub (`OWNER/NAME`)."""
    revision: str | None = None
    """Commit, tag or branch of the repository."""
    file: str | None = None
    """The file of weights (`.safetensors`) in it; may be left out if it has only one."""
    scale: float = Field(default=1.0, ge=-10, le=10)
    """The factor of its weights."""


class MakerOptions(Options):
    """A model that makes pictures, and how it is called."""

    model: str
    """A text-to-image pipeline of diffusers (folder, or `OWNER/NAME` on the hub), or one of ours: a training run, a
    checkpoint, a saved pipeline, a file of weights, or a released checkpoint by its name."""
    revision: str | None = None
    """Commit, tag or branch of a model on the hub. The corpus remembers the commit."""
    name: str = ""
    """Name of the maker in its pictures' fields; their seeds depend on it. Default: the end of `model`."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the pictures, among the weights of all makers."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Steps of the sampler. Default: what is known of the model, else its pipeline's."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale. Default: as for `steps`."""
    size: int | tuple[int, int] | None = None
    """Pixels of a side, or [width, height]. Default: the model's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the weights. Default: bfloat16, and float32 for our own network."""
    variant: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]+$")
    """Take the files of weights with this in their names (`fp16`), where there are such."""
    negative_prompt: str | None = None
    """Negative prompt: a description to steer away from."""
    lora: list[LoraOptions] = Field(default=[])
    """LoRAs, which are added to each other."""
    arguments: dict[str, Any] = Field(default={})
    """Further arguments of the pipeline's call, by the names that it has for them: `true_cfg_scale: 4`."""
    batch: int = Field(default=8, ge=1, le=1024)
    """Pictures that are drawn together; halved where the memory is too small. Another value may move the last bits of
    the numbers, not more."""
    license: str = ""
    """Licence of the pictures. Default: what is known of the model, else what its model card says."""
    autoencoder: str | None = None
    """For a file of weights of our network, which does not name it: the autoencoder."""
    text_encoder: str | None = None
    """The same: the text encoder."""

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        for side in (size,) if isinstance(size, int) else size or ():
            if not 8 <= side <= 16384:
                raise ValueError("expected 8 to 16384 pixels")
        return size

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name and not MAKER.fullmatch(name):
            raise ValueError("expected lower-case letters, digits, . _ and -")
        return name

    @property
    def label(self) -> str:
        """The maker's name: `name`, or the end of `model`."""
        end = self.model.rstrip("/").rpartition("/")[2].lower()
        return self.name or NOT_IN_NAMES.sub("-", end).strip("-._")[:64] or "maker"

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height that are asked for."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class SynthesizeSource(Options):
    """Pictures that models make of prompts.

    They are encoded once, in the format and the quality of the block `images`.
    """

    adapter: Literal["synthesize"]
    prompts: PromptsConfig
    """The prompts."""
    makers: list[MakerOptions] = Field(min_length=1, max_length=64)
    """The models. Each picture is made by one of them, chosen by a hash in the proportion of their weights."""
    images_per_prompt: int = Field(default=1, ge=1, le=1000)
    """Pictures of each prompt, over all makers."""
    seed: int = Field(default=0, ge=0)
    """The base of all pictures' seeds."""
    prompts_per_unit: int = Field(default=256, ge=1, le=1_000_000)
    """Prompts of a unit, which one process draws. With several makers each has units of its own, whose runs of prompts
    are longer, so that it has about as many to draw."""

    @model_validator(mode="after")
    def _check_names(self) -> "SynthesizeSource":
        names = [maker.label for maker in self.makers]
        for number, name in enumerate(names):
            if name in names[:number]:
                path = ("makers", number, "name")
                raise FieldError(path, f"makers.{names.index(name)} has this name, too; give each its own", name)
        return self
