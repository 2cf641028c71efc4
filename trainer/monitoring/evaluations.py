"""Evaluations of a run on its way: figures for the log, and which checkpoint is the best."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.in_training import EvaluateRecipe, RunEvaluation
from microdit.pipeline.selection.run_samples import RunSamples
from microdit.trainer.learner import Learner
from microdit.trainer.monitoring.log import Log
from microdit.trainer.monitoring.progress import Progress
from microdit.trainer.processes import Team
from microdit.trainer.recipe import Recipe


class Evaluations:
    """Carries out a recipe's `evaluate`. Every process makes one, and measures at the same steps."""

    def __init__(self, recipe: Recipe, samples: RunSamples, config: Mapping[str, Any], team: Team, log: Log):
        assert recipe.evaluate is not None
        self.options: EvaluateRecipe = recipe.evaluate
        self.team, self.log = team, log
        self._run = RunEvaluation(
            recipe.evaluate, samples, config, team.device, text=recipe.main_text, latents=recipe.stages[-1].latents,
            seed=recipe.seed, sigma_data=recipe.sigma_data, guidance_scale=recipe.guidance_scale,
            rank=team.rank, world=team.world,
        )  # fmt: skip

    def measure(self, progress: Progress, learner: Learner, latent_shape: Sequence[int]) -> bool:
        """Write the figures to the log; returns whether they are the best so far. Failures are told, the run goes on."""
        began, weights = time.monotonic(), learner.drawing_weights(keep=True)
        try:
            dtype = torch.bfloat16 if learner.bf16 else torch.float32
            figures = self._run.measure(weights, dtype, latent_shape, self.team.gathered)
        except RequestError as error:
            self.log.say(f"step {progress.step}: no evaluation, because {error}")
            return False
        seconds = round(time.monotonic() - began, 3)
        self.log.line(progress.step, images=progress.seen, evaluation=figures | {"seconds": seconds})
        if better := self._run.better(figures, progress.best):
            progress.best, progress.best_step = figures[self.options.metrics[0]]["value"], progress.step
        return better and self.options.keep_best
