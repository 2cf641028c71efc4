"""The interface of the released code: a network with its encoders, built by sizes, which loads released weights.

    from microdit import create_latent_diffusion
    model = create_latent_diffusion(latent_res=64, in_channels=4, pos_interp_scale=2.0).to("cuda")
    model.dit.load_state_dict(torch.load("dit_4_channel_37M_real_and_synthetic_data.pt"))
    images = model.generate(prompt=["red apple"] * 4, num_inference_steps=30, guidance_scale=5.0, seed=2024)

`MicroDiTPipeline.from_pretrained` needs nothing but the name of a checkpoint, and has more options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from microdit.model.network import MicroDiT
from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.model.pretrained.text import load_text_encoder
from microdit.model.text_to_image import MicroDiTPipeline

VAES = {4: "sdxl", 16: "ostris"}  # of the released checkpoints, by channels of the latents
TEXT_ENCODER = "dfn-clip-h"
OPEN_CLIP = "openclip:hf-hub:"  # the released code writes this before a repository


class LatentDiffusion(nn.Module):
    """A network `dit`, and the encoders that it was trained with. Made by `create_latent_diffusion`.

    The encoders are loaded by the first `generate`, and follow `dit` to its device.
    """

    def __init__(self, dit: MicroDiT, vae_name: str, text_encoder_name: str):
        super().__init__()
        self.dit, self.vae_name, self.text_encoder_name = dit, vae_name, text_encoder_name
        self._pipeline: MicroDiTPipeline | None = None

    def pipeline(self) -> MicroDiTPipeline:
        """Give a pipeline of `dit` and the encoders, all on the device of `dit`.

        Raises:
            ValueError: an encoder does not fit the network.
            microdit.model.pretrained.hub.ModelFilesError: the files of an encoder cannot be had.
        """
        if self._pipeline is None:
            vae, text = load_autoencoder(self.vae_name), load_text_encoder(self.text_encoder_name)
            self._pipeline = MicroDiTPipeline(self.dit, vae, text)
        return self._pipeline.to(self.dit.pos_embed.device)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        seed: int | None = None,
        return_only_latents: bool = False,
    ) -> Tensor:
        """Draw one picture of each prompt: float32 (B, 3, H, W), 0 to 1, on the device of `dit`.

        The values are multiples of 1/255, where the released code does not round. return_only_latents: give the
        normalised latents (B, C, h, w) instead.

        seed: the noise of all pictures is drawn at once, on the device, from one generator, as the released code does.
            So the first picture is that of `MicroDiTPipeline` for the same seed on a CPU; the others are not those
            of `seed + i`. None and 0 are the seed of a fresh `torch.Generator`.

        Raises:
            As `pipeline`, and ValueError if an argument is out of range.
        """
        pipeline, device = self.pipeline(), self.dit.pos_embed.device
        generator = torch.Generator(device)
        if seed:
            generator.manual_seed(seed)
        count = 1 if isinstance(prompt, str) else len(prompt)
        shape = (count, self.dit.in_channels, *pipeline.sample_size)
        images: Tensor = pipeline(
            prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents=torch.randn(shape, generator=generator, device=device),
            output_type="latent" if return_only_latents else "pt",
        ).images
        return images.to(device)


def create_latent_diffusion(
    latent_res: int = 32,
    in_channels: int = 4,
    pos_interp_scale: float = 1.0,
    *,
    vae_name: str | None = None,
    text_encoder_name: str | None = None,
    **network: Any,
) -> LatentDiffusion:
    """Build a MicroDiT-XL/2 with fresh weights and name its encoders, by the arguments of the released code.

    latent_res: side of the latents; 64 is 512 px, as released. pos_interp_scale: 1 for 256 px, 2 for 512 px, as
        released.
    vae_name, text_encoder_name: as `load_autoencoder` and `load_text_encoder` take them. None: those of the released
        checkpoints, the SDXL VAE (4 channels) or Ostris' (16), and the text tower of DFN5B-CLIP-ViT-H-14-378.
    network: further arguments of `MicroDiT`, for another size.

    >>> tiny = {"dim": 32, "depth": 2, "head_dim": 16, "caption_channels": 384, "patch_mixer_dim": 32}
    >>> model = create_latent_diffusion(latent_res=4, vae_name="demo", text_encoder_name="minilm", **tiny).to("cpu")
    >>> weights = model.dit.state_dict()  # or torch.load("dit_4_channel_37M_real_and_synthetic_data.pt")
    >>> model.dit.load_state_dict(weights)
    <All keys matched successfully>
    >>> model.generate(prompt=["red apple"] * 2, num_inference_steps=2, guidance_scale=5.0, seed=2024).shape
    torch.Size([2, 3, 32, 32])

    Raises:
        ValueError: no autoencoder is known for this number of channels, and none was named; or the sizes do not fit.
    """
    if vae_name is None and in_channels not in VAES:
        raise ValueError(f"in_channels={in_channels}: expected one of {', '.join(map(str, VAES))}, or a vae_name")
    sizes = {"input_size": latent_res, "in_channels": in_channels, "pos_interp_scale": pos_interp_scale}
    return LatentDiffusion(
        MicroDiT.xl_2(**(sizes | network)),
        vae_name or VAES[in_channels],
        (text_encoder_name or TEXT_ENCODER).removeprefix(OPEN_CLIP),
    )
