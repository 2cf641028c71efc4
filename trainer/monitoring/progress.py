"""Progress of a run, and the lengths of its legs on this machine, which a time budget keeps adjusting."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from microdit.trainer.objective import NOISE_BINS
from microdit.trainer.processes import Team
from microdit.trainer.recipe import LegRecipe

RESERVE = 0.03  # of the time left: checkpoints take a little
SMOOTHING = 0.3  # share of the newest speed in what is believed
LEAST_CHANGE = 0.03  # of the steps left: smaller changes are not worth a new plan


@dataclass
class Progress:
    """State of a checkpoint beside its tensors; a leg is called `stage` there."""

    lengths: list[int]  # steps of each leg
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
    even_lanes: bool = True  # as in `Lanes`; checkpoints of earlier versions, which do not say, have other ones

    def images(self, legs: Sequence[LegRecipe]) -> int:
        """Count the images that the whole run sees."""
        return sum(length * leg.batch for length, leg in zip(self.lengths, legs, strict=True))

    def position(self) -> dict[str, Any]:
        """Return what a step, and a look after it, change of this."""
        return {name: getattr(self, name) for name in ("stage", "stage_step", "step", "seen", "validation", "looked")}

    def advance(self, images: int) -> None:
        """Count a step."""
        self.step += 1
        self.stage_step += 1
        self.seen += images


class TimeBudget:
    """Keeps the lengths in a `Progress` such that the run ends in time, and never longer than the recipe's.

    All that is left of the legs is shortened alike, so that every leg keeps its share and its schedule. A machine that
    becomes free again gets the steps back.

    Args:
        step_seconds: what a step of each leg takes, measured before the run.
        left: seconds from now until the run shall end.
    """

    def __init__(
        self,
        progress: Progress,
        legs: Sequence[LegRecipe],
        step_seconds: Sequence[float],
        left: float,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.progress, self.legs, self.step_seconds = progress, legs, list(step_seconds)
        self._clock, self._ends = clock, clock() + left
        self._slower = 1.0  # than measured before the run

    def observe(self, images_per_second: float) -> None:
        """Take in the speed of the current leg over its last steps."""
        leg = self.progress.stage
        now = self.legs[leg].batch / images_per_second / self.step_seconds[leg]
        self._slower += SMOOTHING * (now - self._slower)

    def keep(self, team: Team, say: Callable[[str], None]) -> bool:
        """Fit what is left of the run into the time left; returns whether its legs have other lengths now."""
        progress, before = self.progress, self.progress.scale
        if not self.fit(-team.largest(-self.share())):
            return False
        if abs(progress.scale - before) > 0.05:
            say(
                f"time budget: on this machine there is time for {progress.images(self.legs):,} images, "
                f"{progress.scale:.0%} of the recipe's"
            )
        return True

    def share(self) -> float:
        """Compute the share, at most 1, of the steps that the recipe leaves for which there is time."""
        needed = sum(steps * seconds for steps, seconds in zip(self._whole(), self.step_seconds, strict=True))
        left = max(self._ends - self._clock(), 0.0) * (1 - RESERVE)
        return min(1.0, left / max(self._slower * needed, 1e-9))

    def fit(self, share: float) -> bool:
        """Give the legs that are not over `share` of the steps left; returns whether that changed anything much."""
        progress = self.progress
        lengths = list(progress.lengths)
        for number, steps in enumerate(self._whole()):
            if number >= progress.stage:
                done = progress.stage_step if number == progress.stage else 0
                # whole steps, and never nothing of a leg
                lengths[number] = max(done + int(steps * share + 1e-6), done, 1)
        left = sum(progress.lengths[progress.stage :]) - progress.stage_step
        if abs(sum(lengths) - sum(progress.lengths)) <= LEAST_CHANGE * left:
            return False
        progress.lengths = lengths
        progress.scale = progress.images(self.legs) / sum(leg.length * leg.batch for leg in self.legs)
        return True

    def _whole(self) -> list[float]:
        """Count the steps left of each leg, at the recipe's length: what it did so far counts by its share."""
        progress = self.progress
        left = [0.0 if number < progress.stage else float(leg.length) for number, leg in enumerate(self.legs)]
        left[progress.stage] *= 1 - progress.stage_step / progress.lengths[progress.stage]
        return left
