"""Sheets of pictures on the way: the same prompts and the same noise every time, drawn by the code of `generate`.

The first process draws, with a network of its own that gets the averaged weights. The others wait.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from microdit.model.picture_files import grid
from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.evaluation.training_pictures import UNLOADABLE, TrainingPictures
from microdit.pipeline.selection.run_samples import RunSamples
from microdit.pipeline.selection.sample_index import read_captions
from microdit.trainer.checkpoints.contents import folder_name
from microdit.trainer.learner import Learner
from microdit.trainer.monitoring.log import Log
from microdit.trainer.processes import Team
from microdit.trainer.recipe import Recipe

CAPTIONS = 8  # of the held-out samples, if the recipe gives no prompts
SAMPLER, STEPS = "unipc", 20
SEED = 1  # of the first picture's noise
PATIENCE = timedelta(hours=6)  # of the others: models may have to be downloaded


class SampleSheets:
    """Draws what a recipe's `sample_prompts` say. Every process makes one, and draws at the same steps.

    Raises:
        RequestError: text encoder or autoencoder of the columns cannot be had.
    """

    def __init__(self, recipe: Recipe, samples: RunSamples, config: Mapping[str, Any], team: Team, log: Log):
        self.recipe, self.samples, self.config, self.team, self.log = recipe, samples, config, team, log
        self.every = int(recipe.sample_every or 0)
        # a group of its own, because the others wait much longer here than for each other's gradients
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if team.world > 1 else None
        team.from_first(self._load, self._group)

    def draw(self, step: int, learner: Learner, latent_shape: Sequence[int]) -> None:
        """Draw OUT/samples/step-*.png. What goes wrong is told, and the run goes on."""
        weights = learner.drawing_weights(keep=self.team.rank == 0)

        def drawn() -> None:
            try:
                self._draw(step, learner, weights, latent_shape)
            except (OSError, RuntimeError, ValueError) as error:  # the disk is full, or the GPU's memory
                self.log.say(f"step {step}: no pictures, because {first_line(error)}")

        self.team.from_first(drawn, self._group)

    def _load(self) -> None:
        recipe, samples = self.recipe, self.samples
        try:
            prompts = list(recipe.sample_prompts) or read_captions(
                samples.corpus, recipe.main_text, samples.held.take(samples.held.lowest(CAPTIONS, recipe.seed + 1))
            )
            text, latents = (
                samples.corpus.column(one).made_by for one in (recipe.main_text, recipe.stages[-1].latents)
            )
            scale, device = recipe.guidance_scale, self.team.device
            self.pictures = TrainingPictures(self.config, prompts, text, latents, device, recipe.sigma_data, scale)
        except UNLOADABLE as error:
            raise RequestError(
                f"sample_every = {recipe.sample_every}: what draws pictures cannot be had: {error}; "
                "leave sample_every out to train without them"
            ) from error

    def _draw(self, step: int, learner: Learner, weights: Mapping[str, Tensor], latent_shape: Sequence[int]) -> None:
        prompts, dtype = self.pictures.prompts, torch.bfloat16 if learner.bf16 else torch.float32
        numbers, options = range(len(prompts)), {"num_inference_steps": STEPS, "sampler": SAMPLER}
        pictures = self.pictures.draw(weights, dtype, latent_shape, numbers, SEED, **options)
        sheet = grid([[picture] for picture in pictures], prompts)
        path = self.recipe.out / "samples" / f"{folder_name(step)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        sheet.save(partial, "PNG")
        partial.rename(path)
        self.log.picture(step, sheet)
