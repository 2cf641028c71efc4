"""The recipe: everything that decides what a run computes, in one YAML file (configs/recipes/)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from microdit.pipeline.config.evaluation import EvaluateRecipe
from microdit.pipeline.config.yaml import load_yaml

AUTO = 0  # as a micro-batch


class RecipePart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LegRecipe(RecipePart):
    """One leg of the run, an entry of `stages`: a resolution, a length, a mask ratio, a learning rate."""

    latents: str
    """The latents column to train on; it gives resolution and channels."""
    selection: str | None = None
    """Replaces the recipe's."""
    images: int | None = Field(None, gt=0)
    """Number of images to see, rounded up to whole batches. Give this or `steps`."""
    steps: int | None = Field(None, gt=0, description="Optimizer steps of the leg. Give this or `images`.")
    batch: int = Field(2048, gt=0)
    """Images a step, over all processes: a multiple of the recipe's `lanes`."""
    micro_batch: Annotated[int, Field(ge=0), BeforeValidator(lambda v: AUTO if v == "auto" else v)] | None = None
    """Images of one process in one pass; lower it when memory runs out. The numbers stay the same up to rounding.
    auto: on a GPU the whole, a half, a quarter and so on, the first that fits; on a CPU 32. Without it the whole."""
    mask_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the patches dropped after the patch mixer."""
    learning_rate: float = Field(gt=0, description="AdamW's rate after the warm-up.")
    warmup: int = Field(0, ge=0)
    """Images over which the rate rises from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the decay, after the warm-up, from `learning_rate` to `final_learning_rate` at the leg's end."""
    final_learning_rate: float = Field(0.0, ge=0, description="The rate at the leg's end, unless it is constant.")
    p_mean: float = -0.6
    """Training noise: ln(sigma) has this mean and the deviation `p_std`."""
    p_std: float = Field(1.2, gt=0, description="Standard deviation of ln(sigma).")
    clip: float | None = Field(None, gt=0)
    """Largest norm of the whole gradient, in place of the optimizer's."""
    ema_half_life: Annotated[float, Field(gt=0)] | list[Annotated[float, Field(gt=0)]] | None = None
    """Images after which a weight counts half in the moving average; without it the leg keeps none. A list keeps
    one for each; `generate` takes the first."""
    ema_start: int = Field(0, ge=0)
    """Images of the leg before the averages begin, with the weights of then. 0: those of the leg before go on."""
    reset_optimizer: bool = False
    """Begin with a fresh AdamW: its moments are those of no leg before."""

    @model_validator(mode="after")
    def _one_length(self) -> "LegRecipe":
        if (self.images is None) == (self.steps is None):
            raise ValueError("give either images or steps")
        return self

    @property
    def half_lives(self) -> list[float]:
        value = self.ema_half_life
        return value if isinstance(value, list) else [] if value is None else [value]

    @property
    def length(self) -> int:
        """Steps of the leg."""
        return self.steps if self.steps is not None else -(-(self.images or 0) // self.batch)


class OptimizerRecipe(RecipePart):
    """AdamW, or Muon beside it."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the blocks take orthogonal steps of the same size, all else is AdamW's. Not with fsdp."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW's decoupled weight decay.")
    clip: float | None = Field(default=0.25, gt=0)
    """Largest norm of the whole gradient."""
    expert_rate: float = Field(default=1.0, gt=0)
    """Learning rate of the experts' weights, relative to that of all others."""


class Recipe(RecipePart):
    """A run of the trainer. `OPERATION` names the fields that change nothing of what is computed (beyond rounding)."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="The name of the run.")
    corpus: str = Field(description="The corpus to train on: a folder, or s3://bucket/prefix, gs://..., az://...")
    out: Path
    """Folder of this machine for logs and pictures, and for the checkpoints too unless `checkpoints` is given."""
    checkpoints: str | None = None
    """Where checkpoints go in place of OUT/checkpoints: a folder, or s3://bucket/prefix, gs://..., az://... Where the
    machine may vanish, give a bucket: the same command on another one goes on from there."""
    selection: str | None = None
    """`name` or `name@hash`; without one, every row that has all columns."""
    mix: dict[str, Annotated[float, Field(gt=0)]] = {}
    """How often the samples of a source come, e.g. {diffusiondb: 0.5}: by it the weights of the selection are
    multiplied; sources that are not named have 1."""
    seed: int = Field(0, ge=0, lt=2**63, description="Everything random of the run follows from it.")
    init: str | None = None
    """Weights to start from: a released checkpoint by name, or whatever else `microdit generate` opens. Its columns
    must be made as those it was trained on. Leave `model` out then."""
    model: dict[str, Any] = {}
    """Arguments of `MicroDiT`, or `preset: tiny_2` and what differs from it. Latent size, channels and caption
    width come from the columns."""
    text: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Text columns and how often each is drawn, e.g. {text/minilm@source: 0.5, text/minilm@long: 0.5}."""
    text_lengths: list[Annotated[int, Field(gt=0)]] = Field([16, 32, 48, 64, 77, 96, 120, 160, 256, 512], min_length=1)
    """Text of a micro-batch is padded to the first of these that holds it."""
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of samples that see zero embeddings instead of text: what guidance needs."""
    hold_out: int = Field(0, ge=0)
    """Samples never trained on, drawn by the seed."""
    lanes: int = Field(128, gt=0)
    """Virtual lanes of the data order; the number of processes must divide it."""
    shuffle_window: int = Field(4, gt=0)
    """Shards of a lane among which rows are shuffled."""
    cache_mb: int = Field(2048, gt=0)
    """Memory of a process for shards that were read, as they are stored."""
    cache_folder: Path | None = None
    """Folder of this machine for copies of what is read from a bucket; a corpus in a folder is read where it is."""
    cache_gb: float = Field(100.0, gt=0)
    """Most that is kept in `cache_folder`, by all processes of the machine together."""
    max_broken: float = Field(0.01, ge=0, lt=1)
    """Share of a leg's samples that may turn out broken; each is replaced by another one of its lane. More end the
    run."""
    stages: list[LegRecipe] = Field(min_length=1, description="The legs of the run, one after the other.")
    optimizer: OptimizerRecipe = Field(OptimizerRecipe(), description="AdamW's settings, for all legs.")
    sigma_data: float = Field(0.9, gt=0, description="Standard deviation of the latents, for EDM's preconditioning.")
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 is autocast over fp32 weights; auto takes it on GPUs and on CPUs with matrix units for it."""
    compile: bool = False
    """Compile each block (torch.compile): faster on a GPU, after minutes at the start."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work. ddp: each holds the whole network. fsdp (FSDP2, block by block): each holds
    its part of weights, averages and AdamW's state, for what does not fit otherwise. Checkpoints are the same."""
    time_budget: float | None = Field(None, gt=0)
    """Seconds. What is left of the legs is shortened alike where it would take longer, by the speed measured before
    the first step and all along."""
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between checkpoints."""
    checkpoint_minutes: float | None = Field(None, gt=0)
    """And whenever so much time has passed since the last one."""
    checkpoint_keep: int = Field(2, gt=0)
    """Number of checkpoints to keep, the newest ones."""
    checkpoint_keep_hours: float | None = Field(None, gt=0)
    """And of every so many hours of training the last one, for good: to go back to, or to compare with."""
    log_every: int = Field(20, gt=0)
    """Steps between lines of the log."""
    validate_every: int = Field(1000, gt=0)
    """Steps between validations, the loss of what is held out (`hold_out`; nothing without it). There is one before the
    first step and one at the end too."""
    sample_every: int | None = Field(None, gt=0)
    """Steps between sheets of pictures, OUT/samples/step-*.png; also before the first step and at the end. Text encoder
    and autoencoder of the columns must be at hand, which is seen at the start."""
    sample_prompts: list[str] = []
    """Captions to draw on them; without any, captions that are held out."""
    evaluate: EvaluateRecipe | None = None
    """Measure pictures of the moving average on the way; the figures go where those of the log go."""
    wandb: str | None = None
    """A project of W&B that gets what the log gets (pip install "microdit[wandb]")."""
    sigma_min: float = Field(0.002, gt=0, lt=80)
    """The lowest noise that pictures are drawn from; from there one step leads to the picture. Where `p_mean` and
    `p_std` leave low noise untrained, steps below the trained range only spoil the picture: exp(p_mean - 2 p_std)."""
    guidance_scale: float = Field(5.0, ge=0)
    """Default of `generate`."""

    @model_validator(mode="after")
    def _whole_lanes(self) -> "Recipe":
        for number, leg in enumerate(self.stages):
            if leg.batch % self.lanes:
                raise ValueError(
                    f"stages.{number}.batch: {leg.batch} is no multiple of lanes={self.lanes}; "
                    f"give such a batch, or set lanes to a divisor of {leg.batch}"
                )
        if self.optimizer.name == "muon" and self.parallel == "fsdp":
            raise ValueError("optimizer.name: muon needs whole matrices; with parallel = fsdp take adamw")
        if sorted(set(self.text_lengths)) != self.text_lengths:
            raise ValueError(f"text_lengths: {self.text_lengths} must rise")
        if self.sample_every and not self.sample_prompts and not self.hold_out:
            raise ValueError("sample_every: there is nothing to draw; give sample_prompts, or hold_out for captions")
        return self

    @property
    def main_text(self) -> str:
        """The text column that is drawn most often."""
        return max(self.text, key=lambda name: self.text[name])


# A run may go on with other values of these.
OPERATION = {"corpus", "out", "cache_mb", "time_budget", "checkpoint_every", "checkpoint_keep", "log_every"} | {
    "guidance_scale", "sigma_min", "compile", "checkpoint_minutes", "wandb", "cache_folder", "cache_gb", "max_broken",
    "validate_every", "sample_every", "sample_prompts", "evaluate",
    "checkpoints", "checkpoint_keep_hours", "parallel", "name", "text_lengths",
}  # fmt: skip
# And with other values of these in a leg that is not over, and with another optimizer; a checkpoint tells what changed.
LEG_CHANGES = {"learning_rate", "final_learning_rate", "warmup", "schedule", "clip", "images", "steps"} | {
    "reset_optimizer"
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe of a YAML file with `key=value` overrides (`stages.0.images=1000`).

    Raises:
        RequestError: naming file, field, value and what was expected.
    """
    return load_yaml(path, Recipe, overrides)


def identity(recipe: Recipe) -> dict[str, Any]:
    """Collect what decides what is computed, by name (`stages.0.batch`): all but `OPERATION` and the micro-batches."""
    fields = recipe.model_dump(mode="json", exclude=OPERATION)
    legs, optimizer = fields.pop("stages"), fields.pop("optimizer")
    fields |= {"stages": len(legs)} | {f"optimizer.{name}": value for name, value in optimizer.items()}
    for number, leg in enumerate(legs):
        fields |= {f"stages.{number}.{name}": value for name, value in leg.items() if name != "micro_batch"}
    return fields
