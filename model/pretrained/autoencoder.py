"""Images to latents and back: diffusers autoencoders by name, hub repository or folder.

    uint8 (B, H, W, 3) --> -1..1 (B, 3, H, W) --encoder--> posterior (mean, std) --normaliser--> latents (B, C, h, w)

How latents are normalised is read from the model's own config, never written here:

    shift_scale  (z - shift_factor) * scaling_factor
    mean_std     (z - latents_mean) / latents_std * scaling_factor, by channel
    batch_norm   (p - running_mean) / sqrt(running_var + batch_norm_eps), p = z with 2 x 2 patches as channels (FLUX.2)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from microdit.model.pretrained.hub import Fingerprint, ModelConfig, ModelFiles, fetch, new_folder, require


@dataclass(frozen=True)
class AutoencoderEntry:
    """The repository or folder of an autoencoder, and how it runs.

    where: a hub repository or a folder. subfolder: of it; None is `vae` where there is one, else the root. revision: a
    commit's hash or the beginning of it; None is the newest commit of `main`, which the fingerprint then names.
    dtype: the same on every machine, so that a corpus can be made on several; bfloat16 is safe for every one of them
    (the SDXL one gives NaN in float16).
    """

    where: str
    subfolder: str | None = ""
    revision: str | None = None
    dtype: torch.dtype = torch.bfloat16


AUTOENCODERS = {
    "demo": AutoencoderEntry(str(Path(__file__).parent / "demo_autoencoder"), dtype=torch.float32),
    "sdxl": AutoencoderEntry(
        "stabilityai/stable-diffusion-xl-base-1.0", "vae", "462165984030d82259a11f4367a4eed129e94a7b"
    ),
    "sdxl-fp16-fix": AutoencoderEntry("madebyollin/sdxl-vae-fp16-fix", "", "207b116dae70ace3637169f1ddd2434b91b3a8cd"),
    # the commits before it have another scaling factor
    "ostris": AutoencoderEntry("ostris/vae-kl-f8-d16", "", "77878ec"),
    "flux2": AutoencoderEntry("black-forest-labs/FLUX.2-klein-4B", "vae", "e7b7dc27f91deacad38e78976d1f2b499d76a294"),
}

CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderKLFlux2")
DETERMINISTIC = ("AutoencoderDC",)

WEIGHTS = (
    ("diffusion_pytorch_model.safetensors",),
    ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-?????-of-?????.safetensors"),
    ("diffusion_pytorch_model.bin",),
)

Kind = Literal["shift_scale", "mean_std", "batch_norm"]
CPU_PIXELS = 4 * 128 * 128  # images that go through a CPU together: with more, activations leave its caches


@dataclass(frozen=True)
class Normaliser:
    """Normalisation of latents (see the top of this file): the kind, and its numbers."""

    kind: Kind
    shift: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    scale: float | None = None
    eps: float | None = None

    def to_json(self) -> Fingerprint:
        """Give the kind and its numbers, as fingerprints hold them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ResolvedAutoencoder:
    """A resolved name: the entry with all its fields decided, its config file, and what that says."""

    entry: AutoencoderEntry
    files: ModelFiles
    config: ModelConfig


class Autoencoder:
    """A loaded autoencoder. Made by `load_autoencoder`.

    Attributes:
        name: as given to `load_autoencoder`. revision: the commit on the hub, None for a folder.
        channels: C of the latents.
        downsample: sides of an image over sides of its latents.
        deterministic: it gives latents, and no posterior of them.
        normaliser: `shift_scale`, `mean_std` or `batch_norm`.
        class_name: diffusers' class of its network.
        fingerprint: identifies its numbers: files, dtype and normaliser, as `autoencoder_fingerprint` gives them.
    """

    def __init__(
        self, module: Any, name: str, fingerprint: Fingerprint, normaliser: Normaliser, device: str | torch.device
    ):
        self.name, self.fingerprint, self.revision = name, fingerprint, fingerprint.get("revision")
        self.class_name = type(module).__name__
        self.deterministic = self.class_name in DETERMINISTIC
        self.normaliser: Kind = normaliser.kind
        self._module = module
        self._mean, self._deviation = _statistics(module, normaliser)
        self._dtype: torch.dtype = getattr(torch, fingerprint["dtype"])
        for part, network in module.named_children():
            if part != "bn":  # the statistics of a batch norm would lose their digits in bfloat16
                network.to(self._dtype, memory_format=torch.channels_last)
        self.to(device)
        config = module.config
        self._patch = config.patch_size[0] if self.normaliser == "batch_norm" else 1  # FLUX.2 has square ones
        self.channels = int(config.latent_channels) * self._patch**2
        blocks = config.get("block_out_channels") or config.encoder_block_out_channels
        self.downsample = 2 ** (len(blocks) - 1) * self._patch

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self._mean.device

    def to(self, device: str | torch.device) -> Autoencoder:
        """Move it, in place; its dtype is part of its numbers and stays."""
        self._module.to(device=device)
        self._mean, self._deviation = self._mean.to(device), self._deviation.to(device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it into a new folder as diffusers does, in safetensors. Opened in the same dtype it is exactly equal.

        Raises:
            FileExistsError: the folder has something in it.
        """
        origin = self.fingerprint.get("repo") or self.fingerprint["folder"]
        self._module.register_to_config(_name_or_path=origin)  # not the path that it has on this machine
        self._module.save_pretrained(new_folder(folder))

    @torch.inference_mode()
    def encode(
        self,
        images: Tensor | np.ndarray,
        *,
        posterior: Literal["sample", "mode", "moments"] = "sample",
        seeds: Sequence[int] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Encode uint8 images (B, H, W, 3) to normalised latents, float32 (B, C, h, w).

        On a GPU the call may return before they are computed; images and noise in pinned memory are copied meanwhile.

        posterior: `sample` draws each image's latents with a generator of its own, seeded by `seeds[i]`, so that they
            do not depend on the batch; `mode` takes the most likely ones; `moments` gives mean and standard deviation,
            (B, 2C, h, w), so that mean + std * noise is a sample. A deterministic autoencoder gives the same for the
            first two, and has no moments.
        noise: in place of seeds, `self.noise(seeds, H, W)` that was drawn before.

        Raises:
            ValueError: not uint8 (B, H, W, 3), sides that are no multiple of `downsample`, `sample` without a seed, or
                noise, for each image, or another posterior.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images: expected uint8 (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
        height, width = images.shape[1:3]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"images of {height} x {width}: {self.name} takes multiples of {self.downsample} pixels")
        if posterior not in ("sample", "mode", "moments"):
            raise ValueError(f"posterior={posterior!r}: expected 'sample', 'mode' or 'moments'")
        given = noise if noise is not None else seeds
        if posterior == "sample" and not self.deterministic and (given is None or len(given) != len(images)):
            raise ValueError(f"posterior='sample' needs one seed for each of the {len(images)} images")
        parts = [self._moments(part) for part in images.split(self._together(height * width, len(images)))]
        mean = torch.cat([part[0] for part in parts])
        if parts[0][1] is None:
            if posterior == "moments":
                raise ValueError(f"{self.name} is deterministic: it has no moments; ask for 'mode'")
            return self._normalise(mean)
        if posterior == "mode":
            return self._normalise(mean)
        deviation = torch.cat([part[1] for part in parts])
        if posterior == "moments":
            return torch.cat([self._normalise(mean), _patchify(deviation, self._patch) / self._deviation], 1)
        noise = self.noise(seeds or (), height, width) if noise is None else noise
        return self._normalise(mean + deviation * noise.to(mean.device, non_blocking=True))

    def noise(self, seeds: Sequence[int], height: int, width: int) -> Tensor:
        """Draw the noise of `encode`'s posterior samples: standard normal, on the CPU, each image's of its own seed.

        float32 (B, c, h, w), of the shape of what the network gives for images of height x width pixels.
        """
        scale = self.downsample // self._patch
        shape = self.channels // self._patch**2, height // scale, width // scale
        noise = torch.empty(len(seeds), *shape)
        for out, seed in zip(noise, seeds, strict=True):
            torch.randn(shape, generator=torch.Generator().manual_seed(seed), out=out)
        return noise

    def together(self, side: int, most: int) -> int:
        """Say how many images of side x side pixels to put through the network at once: `most`, or fewer on a CPU."""
        return min(most, self._together(side * side, most))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, C, h, w) to uint8 images (B, H, W, 3), on the CPU.

        Raises:
            ValueError: the latents have another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents {tuple(latents.shape)}: {self.name} takes (B, {self.channels}, h, w)")
        raw = latents.to(self.device, torch.float32) * self._deviation + self._mean
        raw = _unpatchify(raw, self._patch).to(self._dtype, memory_format=torch.channels_last)
        area = latents.shape[2] * latents.shape[3] * self.downsample**2
        parts = []
        for part in raw.split(self._together(area, len(raw))):
            pixels = ((self._module.decode(part).sample.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            parts.append(pixels.permute(0, 2, 3, 1).contiguous().cpu())
        return torch.cat(parts)

    def _together(self, area: int, batch: int) -> int:
        """Say how many images of `area` pixels to put through the network at once."""
        return max(1, CPU_PIXELS // area) if self.device.type == "cpu" else batch

    def _moments(self, images: Tensor) -> tuple[Tensor, Any]:
        """Compute mean and standard deviation (None if deterministic) as the network gives them, float32."""
        pixels = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = self._module.encode(pixels.to(self._dtype, memory_format=torch.channels_last))
        if not hasattr(encoded, "latent_dist"):
            return encoded.latent.float(), None
        return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()

    def _normalise(self, raw: Tensor) -> Tensor:
        return ((_patchify(raw, self._patch) - self._mean) / self._deviation).contiguous()


def load_autoencoder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Autoencoder:
    """Load an autoencoder of `AUTOENCODERS`, a hub repository (`owner/name`, `owner/name:subfolder`) or a folder.

    Of a repository or folder without a named sub-folder, `vae/` is taken where there is one, else the root. A
    repository of `AUTOENCODERS` is used as its name is.

    Raises:
        ValueError: no such name, the model is of no known class, or it cannot run in `dtype`.
        microdit.model.pretrained.hub.ModelFilesError: its files cannot be had.
    """
    name = str(name_or_path)
    resolved = _resolve(name, revision, dtype)
    entry, config = resolved.entry, resolved.config
    if entry.dtype == torch.float16 and config.get("force_upcast"):
        raise ValueError(f"autoencoder {name!r} overflows in float16 (force_upcast); take bfloat16 or sdxl-fp16-fix")
    prefix = _prefix(entry)
    files = fetch(entry.where, [f"{prefix}config.json"], weights=_weights(entry), revision=resolved.files.revision)
    import diffusers

    files.check_size(lambda: getattr(diffusers, config["_class_name"]).from_config(config))
    try:
        module, report = getattr(diffusers, config["_class_name"]).from_pretrained(
            files.folder / prefix,
            torch_dtype=torch.float32,
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=files.weights[0].endswith((".safetensors", ".index.json")),
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise files.damaged(files.weights[0], error) from error
    files.check_loaded(report["missing_keys"])
    module = module.eval().requires_grad_(False)
    return Autoencoder(module, name, _fingerprint(replace(resolved, files=files)), _normaliser(config), device)


def autoencoder_fingerprint(
    name_or_path: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None
) -> Fingerprint:
    """Give the fingerprint of `load_autoencoder(...)` from its files: of a repository only the config is fetched.

    Raises:
        As `load_autoencoder`, but for files that are damaged.
    """
    resolved = _resolve(str(name_or_path), revision, dtype)
    require(resolved.files, weights=_weights(resolved.entry))
    return _fingerprint(resolved)


def _prefix(entry: AutoencoderEntry) -> str:
    return f"{entry.subfolder}/" if entry.subfolder else ""


def _weights(entry: AutoencoderEntry) -> list[list[str]]:
    """List the files that its weights may be in, the best first."""
    return [[_prefix(entry) + file for file in group] for group in WEIGHTS]


def _resolve(name: str, revision: str | None, dtype: torch.dtype | None) -> ResolvedAutoencoder:
    """Find the entry that a name stands for, and fetch its config. Raises as `load_autoencoder`."""
    entry = AUTOENCODERS.get(name) or next((e for e in AUTOENCODERS.values() if e.where == name), None)
    if entry is None:
        where, _, subfolder = name.partition(":") if not Path(name).is_dir() else (name, "", "")
        entry = AutoencoderEntry(where, subfolder or None)
    subfolders = ("vae", "") if entry.subfolder is None else (entry.subfolder,)
    candidates = {f"{folder}/config.json" if folder else "config.json": folder for folder in subfolders}
    try:
        files = fetch(entry.where, list(candidates), revision=revision or entry.revision)
    except ValueError as error:
        raise ValueError(f"autoencoder {error}; named ones are {', '.join(AUTOENCODERS)}") from error
    configs = [path for path in candidates if (files.folder / path).is_file()]
    if not configs:
        known = f"; named ones are {', '.join(AUTOENCODERS)}"
        raise ValueError(f"autoencoder {name!r}: there is no {' or '.join(candidates)} in {entry.where}{known}")
    config = files.read_json(configs[0])
    if config.get("_class_name") not in CLASSES:
        kind = config.get("_class_name")
        raise ValueError(f"autoencoder {name!r}: its class is {kind!r}, expected one of {', '.join(CLASSES)}")
    entry = replace(entry, subfolder=candidates[configs[0]], dtype=dtype or entry.dtype)
    return ResolvedAutoencoder(entry, files, config)


def _fingerprint(resolved: ResolvedAutoencoder) -> Fingerprint:
    entry = resolved.entry
    patterns = ["config.json", *(file for group in WEIGHTS for file in group)]
    origin: Fingerprint = resolved.files.origin(*(_prefix(entry) + pattern for pattern in patterns))
    if entry.subfolder:
        origin["subfolder"] = entry.subfolder
    dtype = str(entry.dtype).removeprefix("torch.")
    return {**origin, "dtype": dtype, "normaliser": _normaliser(resolved.config).to_json()}


def _normaliser(config: ModelConfig) -> Normaliser:
    """Read kind and numbers from the config; the mean and deviation of a batch norm are in the weights."""
    if config["_class_name"] == "AutoencoderKLFlux2":
        return Normaliser("batch_norm", eps=_option(config, "batch_norm_eps"))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return Normaliser("mean_std", mean=mean, std=std, scale=_option(config, "scaling_factor"))
    return Normaliser("shift_scale", shift=config.get("shift_factor") or 0.0, scale=_option(config, "scaling_factor"))


def _option(config: ModelConfig, name: str) -> Any:
    """Read an option of the config; old ones leave out the defaults of the class."""
    if name in config:
        return config[name]
    import diffusers

    return inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters[name].default


def _statistics(module: Any, normaliser: Normaliser) -> tuple[Tensor, Tensor]:
    """Compute (mean, deviation), float32 (1, C or 1, 1, 1), with latents = (patchified z - mean) / deviation."""
    scale = 1.0 if normaliser.scale is None else normaliser.scale
    mean: Any = [normaliser.shift]
    deviation: Any = [1 / scale]
    if normaliser.kind == "batch_norm":
        mean, deviation = module.bn.running_mean, (module.bn.running_var + normaliser.eps).sqrt()
    elif normaliser.kind == "mean_std":
        mean, deviation = normaliser.mean, torch.as_tensor(normaliser.std) / scale
    by_channel = [torch.as_tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, deviation)]
    return by_channel[0], by_channel[1]


def _patchify(z: Tensor, patch: int) -> Tensor:
    """Turn (B, C, h, w) into (B, C * patch^2, h / patch, w / patch), channels in the order (c, row, column)."""
    return torch.nn.functional.pixel_unshuffle(z, patch) if patch > 1 else z


def _unpatchify(z: Tensor, patch: int) -> Tensor:
    return torch.nn.functional.pixel_shuffle(z, patch) if patch > 1 else z
