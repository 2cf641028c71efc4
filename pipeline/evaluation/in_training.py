"""Evaluate a run on its way (`evaluate:` in a recipe): pictures of held-out captions, against real ones of the corpus.

Every process draws its share of the captions and extracts the features of its pictures; they are put together in the
order of the captions, so that the figures are those of one process.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from microdit.model.edm import EDM
from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.config.evaluation import EvaluateRecipe
from microdit.pipeline.evaluation.corpus_pictures import read_images
from microdit.pipeline.evaluation.measured_arrays import ArrayMeter, interleaved
from microdit.pipeline.evaluation.metrics import METRICS
from microdit.pipeline.evaluation.training_pictures import UNLOADABLE, TrainingPictures
from microdit.pipeline.selection.run_samples import RunSamples
from microdit.pipeline.selection.sample_index import read_captions

SEED = 1  # of the first picture's noise


class EvaluatedRecipe(Protocol):
    """The fields of a recipe that an evaluation reads."""

    evaluate: EvaluateRecipe | None
    stages: list[Any]
    seed: int
    sigma_data: float
    sigma_min: float
    guidance_scale: float

    @property
    def main_text(self) -> str: ...


class RunEvaluation:
    """Measures the moving average of a run. Every process of the run makes one, and measures at the same steps."""

    def __init__(self, recipe: EvaluatedRecipe, samples: RunSamples, config: Mapping[str, Any], team: Any):
        """Load what draws and measures, and extract the features of the real images.

        Raises:
            RequestError: a model cannot be had, or there are too few captions or images.
        """
        assert recipe.evaluate is not None
        self.options, self.team, self.every = recipe.evaluate, team, recipe.evaluate.every
        options, seed, corpus = self.options, recipe.seed + 1, samples.corpus
        held, index, latents = samples.held, samples.legs[-1], corpus.column(recipe.stages[-1].latents).made_by
        least = max(METRICS[name].least for name in options.metrics)
        if min(len(held), options.images) < least or min(len(index), options.reference) < least:
            raise RequestError(
                f"evaluate: {', '.join(options.metrics)} takes at least {least} pictures and as many real ones; there "
                f"are {min(len(held), options.images)} held-out captions and {min(len(index), options.reference)} real "
                "images; raise hold_out, evaluate.images or evaluate.reference"
            )
        try:
            prompts = read_captions(corpus, recipe.main_text, held.take(held.lowest(options.images, seed)))
            text = corpus.column(recipe.main_text).made_by
            scale = recipe.guidance_scale if options.guidance_scale is None else options.guidance_scale
            edm = EDM(sigma_data=recipe.sigma_data, sigma_min=recipe.sigma_min)
            self.pictures = TrainingPictures(config, prompts, text, latents, team.device, edm, scale)
            real = read_images(corpus, index.take(index.lowest(options.reference, seed)), latents["resolution"])
            self.meter = ArrayMeter(options.metrics, list(real.values()), options.models, team.device)
        except UNLOADABLE as error:
            raise RequestError(f"evaluate: what draws and measures cannot be had: {error}") from error

    def measure(self, progress: Any, learner: Any, latent_shape: Sequence[int], log: Any) -> bool:
        """Measure, and write the figures to the log; returns whether a checkpoint is to be kept as the best.

        What goes wrong is told, and the run goes on. The best value and its step are noted in `progress`.
        """
        began, weights = time.monotonic(), learner.drawing_weights(keep=True)
        features = self._features(weights, torch.bfloat16 if learner.bf16 else torch.float32, latent_shape)
        parts = self.team.gathered(features)
        try:
            if failed := [part for part in parts if isinstance(part, str)]:
                raise RequestError(failed[0])
            figures = self.meter.compare(interleaved(parts, len(self.pictures.prompts)))
        except RequestError as error:
            log.say(f"step {progress.step}: no evaluation, because {error}")
            return False
        seconds = round(time.monotonic() - began, 3)
        log.line(progress.step, images=progress.seen, evaluation=figures | {"seconds": seconds})
        name = self.options.metrics[0]
        value, sign = figures[name]["value"], -1 if METRICS[name].higher_is_better else 1
        if progress.best is not None and sign * value >= sign * progress.best:
            return False
        progress.best, progress.best_step = value, progress.step
        return self.options.keep_best and progress.step > 0  # before the first step there is nothing to keep

    def _features(
        self, weights: Mapping[str, Tensor], dtype: torch.dtype, latent_shape: Sequence[int]
    ) -> dict[str, np.ndarray] | str:
        """Draw this process's share and extract its features; a text says why it could not."""
        numbers = range(self.team.rank, len(self.pictures.prompts), self.team.world)
        options = {"num_inference_steps": self.options.steps, "sampler": "unipc"}
        try:
            drawn = self.pictures.draw(weights, dtype, latent_shape, numbers, SEED, **options)
            return self.meter.features([np.asarray(picture) for picture in drawn])
        except (OSError, RuntimeError, ValueError) as error:
            return first_line(error)
