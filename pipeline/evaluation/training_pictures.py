"""Draw pictures with the weights of a network in training, by the code of `microdit generate`."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from microdit.model.checkpoint import CheckpointError
from microdit.model.edm import EDM
from microdit.model.encoded_prompts import EncodedPrompts
from microdit.model.loading import trained_part
from microdit.model.network import MicroDiT
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.text import TextEncoder
from microdit.model.text_to_image import MicroDiTPipeline, load_encoders
from microdit.pipeline.base.errors import RequestError

UNLOADABLE = (ModelFilesError, CheckpointError, ValueError, KeyError, OSError, RequestError)


class TrainingPictures:
    """Draws prompts with a network of its own, which gets the weights: no matter how the training's is shared out.

    The text encoder is needed once, at the start; the autoencoder stays, and is on the CPU between two drawings.
    """

    def __init__(
        self, config: Mapping[str, Any], prompts: Sequence[str], text: Mapping[str, Any], latents: Mapping[str, Any],
        device: torch.device, edm: EDM, guidance_scale: float,
    ):  # fmt: skip
        """Load the models of a text and a latents column.

        Args:
            config: arguments of `MicroDiT`.
            text: how the text column was made, and `latents` the latents.

        Raises:
            UNLOADABLE: one of them cannot be had, or they do not fit together.
        """
        self.config, self.prompts, self.device = config, list(prompts), device
        self.edm, self.guidance_scale = edm, guidance_scale
        parts = trained_part(dict(text), "encoder"), trained_part(dict(latents), "autoencoder")
        encoder, self.autoencoder = load_encoders(*parts, device)
        self.texts = EncodedPrompts(encoder, self.prompts)
        self.autoencoder.to("cpu")
        with torch.device("meta"):
            self._pipeline(MicroDiT(**self.config))  # which sees whether it all fits together

    def draw(
        self, weights: Mapping[str, Tensor], dtype: torch.dtype, latent_shape: Sequence[int], numbers: Sequence[int],
        seed: int, **options: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Draw the prompts of these numbers; prompt i has seed + i."""
        with torch.device("meta"):
            net = MicroDiT(**self.config)
        net = net.to(dtype).to_empty(device=self.device)
        net.reset_positions()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(weights[name])
        pipe = self._pipeline(net.eval(), sample_size=(latent_shape[1], latent_shape[2])).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        prompts, seeds = [self.prompts[i] for i in numbers], [seed + i for i in numbers]
        try:
            return list(pipe(prompts, seed=seeds, **options).images) if prompts else []
        finally:
            self.autoencoder.to("cpu")

    def _pipeline(self, net: MicroDiT, **options: Any) -> MicroDiTPipeline:
        texts = cast(TextEncoder, self.texts)
        return MicroDiTPipeline(
            net, self.autoencoder, texts, edm=self.edm, guidance_scale=self.guidance_scale, **options
        )
