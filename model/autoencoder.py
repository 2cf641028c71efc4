"""Images to latents and back: diffusers autoencoders by name, hub repository or folder.

    uint8 (B, H, W, 3) --> -1..1 (B, 3, H, W) --encoder--> posterior (mean, std) --normaliser--> latents (B, C, h, w)

How latents are normalised is read from the model's own config, never written here: shift and scale,
`(z - shift_factor) * scaling_factor`; mean and deviation by channel, `(z - latents_mean) / latents_std`; or FLUX.2's
batch norm over patches of 2 x 2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from model.hub import fetch


@dataclass(frozen=True)
class Entry:
    """Where a named autoencoder lies. `dtype` is what its weights bear: the SDXL one gives NaN in float16."""

    where: str
    subfolder: str = ""
    dtype: torch.dtype = torch.bfloat16


AUTOENCODERS = {
    "demo": Entry(str(Path(__file__).parent / "demo_autoencoder"), dtype=torch.float32),
    "sdxl": Entry("stabilityai/stable-diffusion-xl-base-1.0", "vae"),
    "sdxl-fp16-fix": Entry("madebyollin/sdxl-vae-fp16-fix"),
    "ostris": Entry("ostris/vae-kl-f8-d16"),
    "flux2": Entry("black-forest-labs/FLUX.2-klein-4B", "vae"),
}
CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderKLFlux2")
PATCH = 2  # FLUX.2 normalises patches of 2 x 2 latents as channels


class Autoencoder:
    """A loaded autoencoder. Made by `load_autoencoder`.

    Attributes:
        channels: C of the latents.
        downsample: pixels of an image's side for one of the latents'.
        normaliser: `shift_scale`, `mean_std` or `batch_norm`.
        fingerprint: what identifies its numbers: files and dtype.
    """

    def __init__(self, module: Any, name: str, origin: dict[str, str], dtype: torch.dtype, device: torch.device):
        self.name, self.revision = name, origin.get("revision")
        self._module, self._dtype, self._device = module, dtype, device
        config = module.config
        self._mean, self._deviation, self._patch, self.normaliser = _normaliser(module)
        self.channels = int(config.latent_channels) * self._patch**2
        blocks = config.get("block_out_channels") or config.encoder_block_out_channels
        self.downsample = 2 ** (len(blocks) - 1) * self._patch
        self.fingerprint: dict[str, Any] = {**origin, "dtype": str(dtype).removeprefix("torch.")}

    @torch.inference_mode()
    def encode(
        self,
        images: Tensor | np.ndarray,
        *,
        posterior: Literal["sample", "mean", "moments"] = "sample",
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Normalised latents, float32 (B, C, h, w), of uint8 images (B, H, W, 3).

        posterior: `sample` draws each image's latents with a generator of its own, seeded by `seeds[i]`, so that they
            do not depend on the batch; `mean` takes the most likely ones; `moments` gives mean and deviation,
            (B, 2C, h, w). A deterministic autoencoder gives the same for all, and has no moments.

        Raises:
            ValueError: the sides are no multiple of `downsample`, or `sample` has no seeds.
        """
        images = torch.as_tensor(images)
        height, width = images.shape[1:3]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"images of {height} x {width}: {self.name} takes multiples of {self.downsample} pixels")
        pixels = images.to(self._device).permute(0, 3, 1, 2).to(self._dtype) / 127.5 - 1
        encoded = self._module.encode(pixels.contiguous(memory_format=torch.channels_last))
        if not hasattr(encoded, "latent_dist"):
            if posterior == "moments":
                raise ValueError(f"{self.name} is deterministic: it has no moments; ask for 'mean'")
            return self._normalise(encoded.latent.float())
        mean, deviation = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        if posterior == "mean":
            return self._normalise(mean)
        if posterior == "moments":
            scaled = _patchify(deviation, self._patch) / self._deviation
            return torch.cat([self._normalise(mean), scaled], 1)
        if seeds is None or len(seeds) != len(images):
            raise ValueError(f"posterior='sample' needs one seed for each of the {len(images)} images")
        noise = torch.stack([torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])
        return self._normalise(mean + deviation * noise.to(mean.device))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (B, H, W, 3), on the CPU, of normalised latents (B, C, h, w)."""
        raw = latents.to(self._device, torch.float32) * self._deviation + self._mean
        decoded = self._module.decode(_unpatchify(raw, self._patch).to(self._dtype)).sample
        pixels = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().cpu()

    def _normalise(self, raw: Tensor) -> Tensor:
        return (_patchify(raw, self._patch) - self._mean) / self._deviation


def load_autoencoder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Autoencoder:
    """An autoencoder of `AUTOENCODERS`, a hub repository (`owner/name`, `owner/name:subfolder`) or a folder.

    Raises:
        ValueError: no such name, or the model is of no known class.
        model.hub.ModelFilesError: its files cannot be had.
    """
    name = str(name_or_path)
    entry = AUTOENCODERS.get(name)
    if entry is None:
        where, _, subfolder = name.partition(":") if not Path(name).is_dir() else (name, "", "")
        entry = Entry(where, subfolder)
    prefix = f"{entry.subfolder}/" if entry.subfolder else ""
    patterns = [f"{prefix}config.json", f"{prefix}*.safetensors"]
    files = fetch(entry.where, patterns, revision=revision)
    folder = files.folder / entry.subfolder
    if not (folder / "config.json").is_file():
        raise ValueError(f"autoencoder {name!r}: {entry.where} has no {prefix}config.json; give owner/name:subfolder")
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    if kind not in CLASSES:
        raise ValueError(f"autoencoder {name!r}: its class is {kind!r}, expected one of {', '.join(CLASSES)}")
    import diffusers

    dtype = dtype or entry.dtype
    module = getattr(diffusers, kind).from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
    )
    module = module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return Autoencoder(module, name, files.origin(*patterns), dtype, torch.device(device))


def _normaliser(module: Any) -> tuple[Tensor, Tensor, int, str]:
    """(mean, deviation, patch, kind) with latents = (patchified z - mean) / deviation, from the model's own config."""
    config, device = module.config, module.device

    def by_channel(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)

    if hasattr(module, "bn"):
        variance = module.bn.running_var.float() + config.batch_norm_eps
        return by_channel(module.bn.running_mean), by_channel(variance.sqrt()), PATCH, "batch_norm"
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        return by_channel(config.latents_mean), by_channel(config.latents_std), 1, "mean_std"
    shift = config.get("shift_factor") or 0.0
    return by_channel([shift]), by_channel([1 / config.scaling_factor]), 1, "shift_scale"


def _patchify(z: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) to (B, C * patch^2, h / patch, w / patch), channels in the order (c, row, column)."""
    return torch.nn.functional.pixel_unshuffle(z, patch) if patch > 1 else z


def _unpatchify(z: Tensor, patch: int) -> Tensor:
    return torch.nn.functional.pixel_shuffle(z, patch) if patch > 1 else z
