"""What is tried before a run begins: the largest micro-batch that fits into memory, and how long a step takes."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from microdit.pipeline.base.errors import RequestError
from microdit.trainer.data.batch import MicroBatch
from microdit.trainer.data.batches import LegData
from microdit.trainer.learner import Learner
from microdit.trainer.processes import Team
from microdit.trainer.recipe import AUTO, LegRecipe, Recipe

CPU_MICRO_BATCH = 32  # what `auto` is on a CPU, where memory is no good measure
WARM_STEPS, TIMED_STEPS = 3, 8  # of a leg, to measure the speed


def with_micro_batch(
    learner: Learner, leg: LegRecipe, team: Team, latent_shape: tuple[int, int, int], text: tuple[int, int]
) -> LegRecipe:
    """Put a number where a leg says `micro_batch: auto`. text: the most tokens, and their width.

    Raises:
        RequestError: not even one image fits into the memory, or parameters are shared out on GPUs.
    """
    if leg.micro_batch != AUTO:
        return leg
    own = leg.batch // team.world
    if team.device.type == "cpu":
        return leg.model_copy(update={"micro_batch": min(own, CPU_MICRO_BATCH)})
    if learner.sharded:  # each pass needs all processes: one that runs out of memory would leave the others waiting
        raise RequestError("micro_batch: auto cannot be tried with parallel = fsdp; give a number")
    size = largest_that_fits(own, lambda size: _try(learner, leg, size, latent_shape, text))
    return leg.model_copy(update={"micro_batch": int(-team.largest(-size))})


def largest_that_fits(size: int, attempt: Callable[[int], None]) -> int:
    """Return the first of size, size / 2, ... with which `attempt` does not run out of memory."""
    while True:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise RequestError(f"micro_batch: not even one image fits into the memory: {error}") from error
        size = -(-size // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _try(learner: Learner, leg: LegRecipe, size: int, latent_shape: tuple[int, ...], text: tuple[int, int]) -> None:
    """Run made-up samples forward and backward, beside what the optimizer and the averages will hold."""
    states = 2 * (not learner.optimizer.state) + len(leg.half_lives) - len(learner.averages)
    held = [torch.empty_like(p) for p in learner.parameters.values() for _ in range(states)]
    latents = torch.zeros(size, *latent_shape)
    tokens = math.prod(latent_shape[1:]) // learner.net.patch_size**2
    part = MicroBatch(
        torch.arange(size), latents, torch.zeros(size, *text), torch.ones(size, text[0], dtype=torch.bool),
        torch.zeros(size), latents, torch.arange(tokens).expand(size, -1) if leg.mask_ratio else None,
    )  # fmt: skip
    objective = (
        learner.objective.module if isinstance(learner.objective, DistributedDataParallel) else learner.objective
    )
    try:
        with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.bf16):
            loss, _ = objective(part.to(learner.device), leg)
        loss.backward()
    finally:
        learner.optimizer.zero_grad()
        del held


def measure_speed(recipe: Recipe, config: dict[str, Any], team: Team, legs: Sequence[LegData]) -> list[float]:
    """Measure the seconds that a step of each leg takes: a few steps of a network that is thrown away."""
    seconds = []
    for data in legs:
        learner, marks = Learner(recipe, config, team), []
        with closing(data.batches_ahead(0, 0, WARM_STEPS + TIMED_STEPS)) as batches:
            for batch in batches:
                taken = learner.step(batch, data.leg, rate=data.leg.learning_rate)
                taken.loss.item()  # waits for the device
                marks.append(time.perf_counter())
        seconds.append(team.largest((marks[-1] - marks[WARM_STEPS - 1]) / TIMED_STEPS))
    return seconds
