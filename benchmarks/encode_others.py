"""References of `benchmarks/encode.py`: the loop that most people write, and a feed without a model."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from microdit.pipeline.corpus.arrays import array_bytes, array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.stages.latents import Latents


# -- the common loop ---------------------------------------------------------------------------------------------------
class Pictures(Dataset):
    """Images as most people read them: squares of the sides, float32 (3, side, side) in -1..1."""

    def __init__(self, images: list[bytes], sides: Sequence[int]):
        self.images, self.sides = images, sides

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        image = Image.open(io.BytesIO(self.images[i])).convert("RGB")
        found = []
        for side in self.sides:
            scale = side / min(image.size)
            size = max(side, int(image.width * scale)), max(side, int(image.height * scale))
            resized = image.resize(size, Image.Resampling.BICUBIC)
            left, top = ((length - side) // 2 for length in size)
            cut = np.array(resized.crop((left, top, left + side, top + side)))
            found.append(torch.from_numpy(cut).permute(2, 0, 1).float() / 127.5 - 1)
        return found


@dataclass
class Plain:
    """An autoencoder as diffusers loads it, in float32."""

    network: Any
    half: bool


def common_images(
    tar: Path,
    device: str,
    model: Plain,
    sides: Sequence[int],
    images: list[bytes],
    batch: int,
    workers: int,
    sampled: bool,
) -> list[list[np.ndarray]]:
    """Encode latents by side, also written into `tar`."""
    made: list[list[np.ndarray]] = [[] for _ in sides]
    cuda, half = device == "cuda", model.half
    loader = DataLoader(Pictures(images, sides), batch, num_workers=workers, pin_memory=cuda)
    with tarfile.open(tar, "w") as out, torch.inference_mode():
        for number, pixels in enumerate(loader):
            for place, some in enumerate(pixels):
                with torch.autocast(device, torch.bfloat16, enabled=half):
                    posterior = model.network.encode(some.to(device)).latent_dist
                    latents = posterior.sample() if sampled else posterior.mode()
                latents = (latents.float() * model.network.config.scaling_factor).half().cpu().numpy()
                for i, latent in enumerate(latents):
                    add(out, f"{number * batch + i}.{sides[place]}.npy", array_bytes(latent))
                    made[place].append(latent)
    return made


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def common_text(tar: Path, device: str, encoder: Any, texts: list[str], batch: int) -> list[np.ndarray]:
    """Encode captions (most tokens, width) with padding, in order, also into `tar`; by the network of `encoder`."""
    made: list[np.ndarray] = []
    half = encoder.fingerprint["dtype"] != "float32"
    with tarfile.open(tar, "w") as out, torch.inference_mode():
        for start in range(0, len(texts), batch):
            some = texts[start : start + batch]
            if encoder.fingerprint.get("tokens") == "open_clip":
                inputs = {"input_ids": encoder._tokenizer(some).to(device)}
            else:
                inputs = encoder._tokenizer(
                    some, padding="max_length", truncation=True, max_length=encoder.max_tokens, return_tensors="pt"
                ).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=half):
                embeddings = encoder._module(**inputs).last_hidden_state.half().cpu().numpy()
            for i, embedding in enumerate(embeddings):
                add(out, f"{start + i}.npy", array_bytes(embedding))
            made += list(embeddings)
    return made


def arrays(corpus: Corpus, commits: Sequence[Commit]) -> Iterator[np.ndarray]:
    for commit in commits:
        with corpus.open_object(commit) as file:
            yield from (array_from_bytes(members["npy"]) for _, members in read_tar(file))


def difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Compute the largest of all samples' mean differences, each by its mean magnitude."""
    pairs = [(a.astype(np.float32), b.astype(np.float32)) for a, b in zip(ours, theirs, strict=True)]
    return max(float(np.abs(a - b).mean() / max(np.abs(a).mean(), 1e-6)) for a, b in pairs)


# -- the feed ----------------------------------------------------------------------------------------------------------
class NoModel:
    """Stand-in for a model: takes the pixels to the device, and gives zeros."""

    deterministic = False

    def __init__(self, model: Any):
        self.model, self.device, self.noise = model, model.device, model.noise

    def encode(self, pixels: Tensor, noise: Tensor, posterior: str) -> Tensor:
        pixels.to(self.device, non_blocking=True)
        side = pixels.shape[1] // self.model.downsample
        return torch.zeros(len(pixels), self.model.channels, side, side, device=self.device)


def without_model(stage: Latents) -> Latents:
    """Return the stage with models that do nothing."""
    stage.load()
    stage.models = {column: NoModel(model) for column, model in stage.models.items()}
    return stage


def bare_feed(corpus: Corpus, sides: Sequence[int], threads: int) -> None:
    """Decode and resize, and nothing else; what is cut off is not resized either."""

    def squares(data: bytes) -> list[np.ndarray]:
        image = Image.fromarray(simplejpeg.decode_jpeg(data))
        width, height = image.size
        short, found = min(width, height), []
        for side in sides:
            if short == side:
                left, top = (width - side) // 2, (height - side) // 2
                found.append(np.asarray(image.crop((left, top, left + side, top + side))))
            else:
                box = ((width - short) / 2, (height - short) / 2, (width + short) / 2, (height + short) / 2)
                found.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box)))
        return found

    with ThreadPoolExecutor(threads) as pool:
        for commit in corpus.commits(IMAGES):
            with tarfile.open(Path(corpus.url, commit.object.name)) as tar:
                members = [tar.extractfile(info) for info in tar if info.name.endswith(".jpg")]
                for _ in pool.map(squares, [file.read() for file in members if file is not None]):
                    pass
