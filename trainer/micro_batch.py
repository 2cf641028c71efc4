"""Find the largest micro-batch that fits into memory."""

import math
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from microdit.pipeline.base.errors import RequestError
from microdit.trainer.data.batch import MicroBatch
from microdit.trainer.learner import Learner
from microdit.trainer.processes import Team
from microdit.trainer.recipe import AUTO, StageRecipe

CPU_MICRO_BATCH = 32  # what `auto` is on a CPU, where memory is no good measure


def with_micro_batch(
    learner: Learner, stage: StageRecipe, team: Team, latent_shape: tuple[int, int, int], text: tuple[int, int]
) -> StageRecipe:
    """The stage with a number where it says `micro_batch: auto`. text: the most tokens, and their width.

    Raises:
        RequestError: not even one image fits into the memory, or parameters are shared out on GPUs.
    """
    if stage.micro_batch != AUTO:
        return stage
    own = stage.batch // team.world
    if team.device.type == "cpu":
        return stage.model_copy(update={"micro_batch": min(own, CPU_MICRO_BATCH)})
    if learner.sharded:  # each pass needs all processes: one that runs out of memory would leave the others waiting
        raise RequestError("micro_batch: auto cannot be tried with parallel = fsdp; give a number")
    size = largest_that_fits(own, lambda size: _try(learner, stage, size, latent_shape, text))
    return stage.model_copy(update={"micro_batch": int(-team.largest(-size))})


def largest_that_fits(size: int, attempt: Callable[[int], None]) -> int:
    """The first of size, size / 2, ... with which `attempt` does not run out of memory."""
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


def _try(learner: Learner, stage: StageRecipe, size: int, latent_shape: tuple[int, ...], text: tuple[int, int]) -> None:
    """Forward and backward of made-up samples, beside what the optimizer and the averages will hold."""
    states = 2 * (not learner.optimizer.state) + len(stage.half_lives) - len(learner.averages)
    held = [torch.empty_like(p) for p in learner.parameters.values() for _ in range(states)]
    latents = torch.zeros(size, *latent_shape)
    tokens = math.prod(latent_shape[1:]) // learner.net.patch_size**2
    part = MicroBatch(
        torch.arange(size), latents, torch.zeros(size, *text), torch.ones(size, text[0], dtype=torch.bool),
        torch.zeros(size), latents, torch.arange(tokens).expand(size, -1) if stage.mask_ratio else None,
    )  # fmt: skip
    objective = (
        learner.objective.module if isinstance(learner.objective, DistributedDataParallel) else learner.objective
    )
    try:
        with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.bf16):
            loss, _ = objective(part.to(learner.device), stage)
        loss.backward()
    finally:
        learner.optimizer.zero_grad()
        del held
