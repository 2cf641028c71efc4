"""The time budget: how long the stages of a run may be on this machine, asked again and again while it runs."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from microdit.trainer.data.ahead import in_thread
from microdit.trainer.data.batches import StageData
from microdit.trainer.learner import Learner
from microdit.trainer.processes import Team
from microdit.trainer.progress import Progress
from microdit.trainer.recipe import Recipe, StageRecipe

WARM_STEPS, TIMED_STEPS = 3, 8  # of a stage, to measure the speed


def measure_speed(recipe: Recipe, config: dict[str, Any], team: Team, stages: Sequence[StageData]) -> list[float]:
    """Seconds that a step of each stage takes: a few steps of a network that is thrown away."""
    seconds = []
    for stage in stages:
        learner, marks = Learner(recipe, config, team), []
        with closing(in_thread(stage.batches(0, 0, WARM_STEPS + TIMED_STEPS))) as batches:
            for batch in batches:
                taken = learner.step(batch, stage.stage, rate=stage.stage.learning_rate)
                taken.loss.item()  # waits for the device
                marks.append(time.perf_counter())
        seconds.append(team.largest((marks[-1] - marks[WARM_STEPS - 1]) / TIMED_STEPS))
    return seconds


RESERVE = 0.03  # of the time left: checkpoints take a little
SMOOTHING = 0.3  # share of the newest speed in what is believed
LEAST_CHANGE = 0.03  # of the steps left: smaller changes are not worth a new plan


class TimeBudget:
    """Keeps the lengths in a `Progress` such that the run ends in time, and never longer than the recipe's.

    All that is left of the stages is shortened alike, so that every stage keeps its place and its schedule. A machine
    that becomes free again gets the steps back.

    Args:
        step_seconds: what a step of each stage takes, measured before the run.
        left: seconds from now until the run shall end.
    """

    def __init__(
        self,
        progress: Progress,
        stages: Sequence[StageRecipe],
        step_seconds: Sequence[float],
        left: float,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.progress, self.stages, self.step_seconds = progress, stages, list(step_seconds)
        self._clock, self._ends = clock, clock() + left
        self._slower = 1.0  # than measured before the run

    def observe(self, images_per_second: float) -> None:
        """The speed of the current stage over its last steps."""
        stage = self.progress.stage
        now = self.stages[stage].batch / images_per_second / self.step_seconds[stage]
        self._slower += SMOOTHING * (now - self._slower)

    def share(self) -> float:
        """What part of the steps left, by the recipe, there is time for: at most 1."""
        needed = sum(steps * seconds for steps, seconds in zip(self._whole(), self.step_seconds, strict=True))
        left = max(self._ends - self._clock(), 0.0) * (1 - RESERVE)
        return min(1.0, left / max(self._slower * needed, 1e-9))

    def fit(self, share: float) -> bool:
        """Give the stages that are not over `share` of the steps left; whether that changed anything much."""
        progress = self.progress
        lengths = list(progress.lengths)
        for number, steps in enumerate(self._whole()):
            if number >= progress.stage:
                done = progress.stage_step if number == progress.stage else 0
                # whole steps, and never nothing of a stage
                lengths[number] = max(done + int(steps * share + 1e-6), done, 1)
        left = sum(progress.lengths[progress.stage :]) - progress.stage_step
        if abs(sum(lengths) - sum(progress.lengths)) <= LEAST_CHANGE * left:
            return False
        progress.lengths = lengths
        progress.scale = progress.images(self.stages) / sum(stage.length * stage.batch for stage in self.stages)
        return True

    def _whole(self) -> list[float]:
        """Steps left of each stage if it were as long as in the recipe: what it did so far counts by its share."""
        progress = self.progress
        left = [0.0 if number < progress.stage else float(s.length) for number, s in enumerate(self.stages)]
        left[progress.stage] *= 1 - progress.stage_step / progress.lengths[progress.stage]
        return left
