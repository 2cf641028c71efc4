"""Count what a run has done: steps, images, seconds, losses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from microdit.trainer.objective import NOISE_BINS
from microdit.trainer.recipe import StageRecipe


@dataclass
class Progress:
    """What a checkpoint holds beside tensors."""

    lengths: list[int]  # steps of each stage
    scale: float = 1.0  # what the time budget left of the recipe's lengths
    stage: int = 0
    stage_step: int = 0  # steps done in it
    step: int = 0
    seen: int = 0  # images
    skipped: int = 0  # steps whose gradient was not finite
    seconds: float = 0.0
    loss_sum: float = 0.0  # over the steps since the last line of the log
    loss_steps: int = 0
    noise: list[float] = field(default_factory=lambda: [0.0] * (2 * NOISE_BINS))  # the same by noise, see `Step`
    loss: float | None = None  # of the last line
    validation: float | None = None  # the last one: of the first average, or of the weights if there is none
    wandb_run: str | None = None  # which run of W&B goes on
    looked: int = -1  # the step after which the last validation, or the last sheet of pictures, was due

    def images(self, stages: Sequence[StageRecipe]) -> int:
        """How many the whole run sees."""
        return sum(length * stage.batch for length, stage in zip(self.lengths, stages, strict=True))
