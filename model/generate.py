"""Pictures from a checkpoint and prompts: prompt -> text encoder -> sampler (MicroDiT, EDM) -> autoencoder -> PNG."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.edm import EDM
from model.network import MicroDiT

STEP_FOLDER = re.compile(r"step-\d+")
INFO = "generate.json"


def checkpoint_folders(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest first."""
    folders = (out / "checkpoints").glob("step-*") if (out / "checkpoints").is_dir() else ()
    return sorted((f for f in folders if STEP_FOLDER.fullmatch(f.name)), key=lambda f: int(f.name[5:]), reverse=True)


@dataclass
class Generator:
    """Network, text encoder and autoencoder, ready to make pictures.

    settings: what is written into every picture, beside prompt and seed. latent_shape: (C, H, W).
    """

    net: MicroDiT
    edm: EDM
    text_encoder: Any
    autoencoder: Any
    latent_shape: tuple[int, int, int]
    guidance_scale: float
    settings: dict[str, Any]

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        num_inference_steps: int = 30,
        guidance_scale: float | None = None,
        seed: int = 0,
        sampler: str = "heun",
        batch: int = 32,
    ) -> np.ndarray:
        """One picture a prompt, uint8 (B, H, W, 3). Picture i starts from the noise of seed + i, whatever the batch."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        device = self.net.pos_embed.device
        pictures = []
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            noise = torch.stack([noise_of(seed + start + i, self.latent_shape) for i in range(len(part))])
            text, mask = self.encode(part)
            latents = self.edm.sample(
                self.net, noise.to(device), text, text_mask=mask, num_inference_steps=num_inference_steps,
                guidance_scale=scale, sampler=sampler,
            )  # fmt: skip
            pictures.append(self.autoencoder.decode(latents))
        return np.concatenate(pictures)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Caption embeddings (B, L, width) and a bool mask of the real tokens (B, L)."""
        text, lengths = self.text_encoder.encode(list(prompts))
        text = torch.as_tensor(text).to(self.net.pos_embed)
        lengths = torch.as_tensor(lengths, device=text.device)
        return text, torch.arange(text.shape[1], device=text.device) < lengths[:, None]


def noise_of(seed: int, shape: Sequence[int]) -> Tensor:
    """The starting noise of one picture, standard normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
