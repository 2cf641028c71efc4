"""Pictures from a checkpoint and prompts: prompt -> text encoder -> sampler (MicroDiT, EDM) -> autoencoder -> PNG."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from model.autoencoder import Autoencoder, load_autoencoder
from model.checkpoint import SUFFIXES, CheckpointError, load_model
from model.edm import EDM
from model.network import MicroDiT
from model.text import TextEncoder, load_text_encoder

STEP_FOLDER = re.compile(r"step-\d+")
INFO = "generate.json"


def checkpoint_folders(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest first."""
    folders = (out / "checkpoints").glob("step-*") if (out / "checkpoints").is_dir() else ()
    return sorted((f for f in folders if STEP_FOLDER.fullmatch(f.name)), key=lambda f: int(f.name[5:]), reverse=True)


@dataclass
class Generator:
    """Network, text encoder and autoencoder, ready to make pictures.

    latent_shape: (C, H, W). settings: what is written into every picture.
    """

    net: MicroDiT
    edm: EDM
    text_encoder: TextEncoder
    autoencoder: Autoencoder
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
            pictures.append(self.autoencoder.decode(latents).numpy())
        return np.concatenate(pictures)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Caption embeddings (B, L, width) and a bool mask of the real tokens (B, L)."""
        text, lengths = self.text_encoder.encode(prompts)
        return text, torch.arange(text.shape[1], device=text.device) < lengths[:, None]


def noise_of(seed: int, shape: Sequence[int]) -> Tensor:
    """The starting noise of one picture, standard normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load_generator(
    checkpoint: str | Path,
    *,
    ema: bool = True,
    autoencoder: str | None = None,
    text_encoder: str | None = None,
    device: str | None = None,
) -> Generator:
    """What makes pictures from a checkpoint.

    checkpoint: a run's folder (its newest checkpoint is taken), one of its checkpoints, or a file of weights, for which
        autoencoder and text encoder must be named. ema: take the moving average of the weights, where there is one.
    autoencoder, text_encoder: names of `model.autoencoder` and `model.text`, folders or hub repositories, instead of
        those that the checkpoint was trained with. device: the GPU if there is one, else the CPU.

    Raises:
        CheckpointError: there is no checkpoint, it cannot be read, or it does not say what it needs.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(checkpoint)
    info: dict[str, Any]
    if path.suffix in SUFFIXES and path.is_file():
        if not (autoencoder and text_encoder):
            raise CheckpointError(
                f"{path} is a file of weights, which does not say what it was trained with: "
                "name the autoencoder and the text encoder"
            )
        net = load_model(path, device=device)
        side = net.config["input_size"]
        info = {"latent_shape": (net.in_channels, side, side), "latents": {}, "text": {}}
    else:
        folder = find_checkpoint(path)
        path = folder / "ema.safetensors"
        if not (ema and path.is_file()):
            path = folder / "model.safetensors"
        net = load_model(path, device=device)
        info = _read_info(folder / INFO)
    encoder = text_encoder or info["text"]["encoder"]
    text = load_text_encoder(encoder, revision=None if text_encoder else _revision(info["text"]), device=device)
    name = autoencoder or info["latents"]["autoencoder"]
    codec = load_autoencoder(name, revision=None if autoencoder else _revision(info["latents"]), device=device)
    for given, stage, model in ((text_encoder, info["text"], text), (autoencoder, info["latents"], codec)):
        if given is None and stage.get("model", model.fingerprint) != model.fingerprint:
            raise CheckpointError(
                f"{path} was trained with another {model.name!r} than the one here: {stage['model']}, now "
                f"{model.fingerprint}. Name the one to take (autoencoder=, text_encoder=)"
            )
    return Generator(
        net,
        EDM(sigma_data=info.get("sigma_data", EDM.sigma_data)),
        text,
        codec,
        tuple(info["latent_shape"]),
        info.get("guidance_scale", 5.0),
        {"checkpoint": path.as_posix(), "autoencoder": name, "text_encoder": encoder},
    )


def _revision(stage: dict[str, Any]) -> str | None:
    """The commit that a column was made with; the one asked for may have been a branch."""
    return stage.get("model", {}).get("revision") or stage.get("revision")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that is meant: the one itself, or the newest one of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for folder in (path, *checkpoint_folders(path)):
        if (folder / INFO).is_file():
            return folder
    raise CheckpointError(
        f"{path}: there is no checkpoint; expected the out folder of a training run, one of its checkpoints, "
        f"or a file of weights ({', '.join(SUFFIXES)})"
    )


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text())
        if len(info["latent_shape"]) != 3 or not {"latents", "text"} <= info.keys():
            raise ValueError("latent_shape, latents and text are needed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); take an older checkpoint") from error
    return info


def generate(
    checkpoint: str | Path,
    prompts: Sequence[str],
    out: str | Path | None = None,
    *,
    num_inference_steps: int = 30,
    guidance_scale: float | None = None,
    seed: int = 0,
    sampler: str = "heun",
    **loading: Any,
) -> list[Image.Image]:
    """One picture for each prompt; with `out` also as PNG files there, and as `grid.png` if they are several.

    guidance_scale: None is what the recipe of the checkpoint says. Picture i is drawn with seed + i; prompt and
    settings are in the PNG's text fields `prompt` and `parameters` (JSON). loading: as in `load_generator`.
    """
    generator = load_generator(checkpoint, **loading)
    scale = generator.guidance_scale if guidance_scale is None else guidance_scale
    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": scale, "sampler": sampler}
    pictures = [
        Image.fromarray(p)
        for p in generator(
            prompts, num_inference_steps=num_inference_steps, guidance_scale=scale, seed=seed, sampler=sampler
        )
    ]
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        digits = len(str(len(prompts) - 1))
        for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
            info = PngInfo()
            info.add_itxt("prompt", prompt)
            info.add_itxt(
                "parameters", json.dumps({"prompt": prompt, "seed": seed + i, **settings, **generator.settings})
            )
            words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
            picture.save(folder / f"{i:0{digits}d}-{words or 'empty'}.png", pnginfo=info)
        if len(pictures) > 1:
            grid([[picture] for picture in pictures], list(prompts)).save(folder / "grid.png")
    return pictures


def grid(cells: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """Cells of pictures of one size, side by side, each over its caption; by default about as wide as it is high."""
    side = max(96, cells[0][0].width)
    width, height, gap = side * len(cells[0]), side + 18, 6
    columns = columns or max(1, round(math.sqrt(len(cells) * height / width)))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (pictures, caption) in enumerate(zip(cells, captions, strict=True)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + gap)
        for number, picture in enumerate(pictures):
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left + number * side, top))
        text = " ".join(caption.split())
        while text and draw.textlength(text, font) > width:
            text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
        draw.text((left, top + side + 2), text, "black", font)
    return sheet
