"""Evaluate a run on its way (`evaluate:` in a recipe): pictures of held-out captions, against real ones of the corpus.

Every process draws its share of the captions and extracts the features of its pictures; they are put together in the
order of the captions, so that the figures are those of one process.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.corpus_pictures import read_images
from microdit.pipeline.evaluation.measured_arrays import ArrayMeter, interleaved
from microdit.pipeline.evaluation.metrics import METRICS
from microdit.pipeline.evaluation.training_pictures import UNLOADABLE, TrainingPictures
from microdit.pipeline.selection.run_samples import RunSamples
from microdit.pipeline.selection.sample_index import read_captions

SEED = 1  # of the first picture's noise


class EvaluateRecipe(BaseModel):
    """What is measured on the way."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(gt=0, description="Steps between two evaluations; there is one at the end too.")
    metrics: list[str] = Field(["kid-lite"], min_length=1)
    """Names of `microdit evaluate` that compare with pictures; by the first one the best checkpoint is told."""
    images: int = Field(256, gt=0)
    """Pictures that are drawn, of held-out captions; fewer if `hold_out` is less."""
    reference: int = Field(1024, gt=0)
    """Real images of the corpus that they are compared with, drawn by the recipe's seed."""
    steps: int = Field(18, gt=0, description="Steps of the sampler.")
    guidance_scale: float | None = Field(None, ge=0, description="Without it the recipe's.")
    models: dict[str, str] = {}
    """Weights of features, e.g. {inception: inception.pth}."""
    keep_best: bool = True
    """Save a checkpoint whenever the first metric is the best so far, and keep that one beside the newest."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if unknown := [name for name in names if name not in METRICS]:
            raise ValueError(f"metric {unknown[0]!r} compares with no pictures; there are {', '.join(METRICS)}")
        return names


class RunEvaluation:
    """Measures the moving average of a run. Every process of the run makes one, and measures at the same steps."""

    def __init__(
        self, options: EvaluateRecipe, samples: RunSamples, config: Mapping[str, Any], device: torch.device,
        *, text: str, latents: str, seed: int, sigma_data: float, guidance_scale: float, rank: int, world: int,
    ):  # fmt: skip
        """Load what draws and measures, and extract the features of the real images.

        Raises:
            RequestError: a model cannot be had, or there are too few captions or images.
        """
        self.options, self.rank, self.world = options, rank, world
        least = max(METRICS[name].least for name in options.metrics)
        held, index, corpus = samples.held, samples.legs[-1], samples.corpus
        if min(len(held), options.images) < least or min(len(index), options.reference) < least:
            raise RequestError(
                f"evaluate: {', '.join(options.metrics)} takes at least {least} pictures and as many real ones; there "
                f"are {min(len(held), options.images)} held-out captions and {min(len(index), options.reference)} real "
                "images; raise hold_out, evaluate.images or evaluate.reference"
            )
        made = corpus.column(latents).made_by
        try:
            prompts = read_captions(corpus, text, held.take(held.lowest(options.images, seed + 1)))
            scale = guidance_scale if options.guidance_scale is None else options.guidance_scale
            self.pictures = TrainingPictures(
                config, prompts, corpus.column(text).made_by, made, device, sigma_data, scale
            )
            real = read_images(corpus, index.take(index.lowest(options.reference, seed + 1)), made["resolution"])
            self.meter = ArrayMeter(options.metrics, list(real.values()), options.models, device)
        except UNLOADABLE as error:
            raise RequestError(f"evaluate: what draws and measures cannot be had: {error}") from error

    def measure(
        self,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        latent_shape: Sequence[int],
        gathered: Callable[[Any], list[Any]],
    ) -> dict[str, Any]:
        """Draw this process's share, and measure those of all: `value` and `error` by metric.

        Args:
            weights: by name, the whole of them.
            gathered: gives the values of all processes, by rank.

        Raises:
            RequestError: a process could not draw, or features are not finite.
        """
        numbers = range(self.rank, len(self.pictures.prompts), self.world)
        features: dict[str, np.ndarray] | str
        try:
            options = {"num_inference_steps": self.options.steps, "sampler": "unipc"}
            drawn = self.pictures.draw(weights, dtype, latent_shape, numbers, SEED, **options)
            features = self.meter.features([np.asarray(picture) for picture in drawn])
        except (OSError, RuntimeError, ValueError) as error:
            features = str(error) or type(error).__name__
        parts = gathered(features)
        if failed := [part for part in parts if isinstance(part, str)]:
            raise RequestError(failed[0])
        return self.meter.compare(interleaved(parts, len(self.pictures.prompts)))

    def better(self, figures: Mapping[str, Any], best: float | None) -> bool:
        """Compare the first metric with the best value so far."""
        name = self.options.metrics[0]
        value, sign = figures[name]["value"], -1 if METRICS[name].higher_is_better else 1
        return best is None or sign * value < sign * best
