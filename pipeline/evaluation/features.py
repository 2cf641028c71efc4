"""Extract features from pictures, by the name of a network and the way in which it takes a picture.

uint8 (H, W, 3) --prepare--> float32 (3, h, w) --network--> float32 (D,)

inception   2,048 of the Inception of 2015-12-05: `fid`, `kid`, `prdc`
clip-b32    512 of CLIP ViT-B/32: `clip-fid`
clip-l14    768 of CLIP ViT-L/14 at 336 pixels, of unit length: `cmmd`
dinov2      1,024 of DINOv2 ViT-L/14: `fd-dinov2`
lite0       1,280 of EfficientNet-Lite0, a package: `fid-lite`, `kid-lite`, which compare with nothing but themselves
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from microdit.model.pretrained.feature_towers import load_feature_tower
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.inception import SCRIPT, WEIGHTS, load_inception
from microdit.model.pretrained.packaged import EFFICIENTNET, load_efficientnet, package_fingerprint
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import chunks, threaded
from microdit.pipeline.evaluation.resizing import PROTOCOLS

INCEPTION, CLIP_B32, CLIP_L14, DINOV2, LITE0 = "inception", "clip-b32", "clip-l14", "dinov2", "lite0"
WIDTHS = {INCEPTION: 2048, CLIP_B32: 512, CLIP_L14: 768, DINOV2: 1024, LITE0: 1280}
MODELS = {  # where each is from if nothing else is said
    CLIP_B32: "openai/clip-vit-base-patch32",
    CLIP_L14: "openai/clip-vit-large-patch14-336",
    DINOV2: "facebook/dinov2-large",
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2_SIDE = 224
BATCH = 32


@dataclass(frozen=True)
class Extractor:
    """A loaded network and how it takes a picture."""

    name: str
    identity: str
    """Everything its numbers depend on: network, weights and resizing. Features of two identities never compare."""
    prepare: Callable[[np.ndarray], np.ndarray]
    network: torch.nn.Module
    unit: bool = False
    """Scale the features to unit length."""
    settings: dict[str, Any] = field(default_factory=dict)

    def extract(self, pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Compute the features (B, D) of pictures, uint8 (H, W, 3), batch by batch in their order."""
        device = next(self.network.parameters()).device
        for batch in chunks(threaded(self.prepare, pictures), BATCH):
            with torch.inference_mode():
                features = self.network(torch.from_numpy(np.stack(batch)).to(device)).float()
            if self.unit:
                features = torch.nn.functional.normalize(features, dim=-1)
            yield features.cpu().numpy()


def load_extractor(
    name: str, *, protocol: str = "clean-fid", model: str | Path | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """Load an extractor.

    Args:
        protocol: of `inception`, how pictures are resized (`microdit.pipeline.evaluation.resizing`).
        model: the file of Inception's weights; of the others a folder or hub repository in place of the usual one.

    Raises:
        RequestError: there is no such name, or its weights cannot be had.
    """
    try:
        return _load(name, protocol, model, device)
    except (ModelFilesError, ValueError) as error:
        raise RequestError(f"features {name!r}: {error}") from error


def _load(name: str, protocol: str, model: str | Path | None, device: str | torch.device) -> Extractor:
    if name == LITE0:
        network, processor = load_efficientnet()
        origin: dict[str, Any] = package_fingerprint(EFFICIENTNET)

        def prepared(pixels: np.ndarray) -> np.ndarray:
            values = processor(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"]
            return np.asarray(values[0], np.float32)

        return Extractor(name, f"{name} {origin['sha256'][:16]}", prepared, network.to(device), settings=origin)
    if name == INCEPTION:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r} is not known; there are {', '.join(PROTOCOLS)}")
        if model is None:
            raise ModelFilesError(
                "its weights are no part of any package: download pt_inception-2015-12-05-6726825d.pth, which "
                "pytorch-fid publishes on GitHub, and give its path as --model inception=PATH"
            )
        network, sha256 = load_inception(model)
        known = {WEIGHTS: "pth", SCRIPT: "torchscript"}[sha256]
        identity = f"{name} {known} {sha256[:16]} {protocol}"
        settings = {"sha256": sha256, "protocol": protocol}
        return Extractor(name, identity, PROTOCOLS[protocol], network.to(device), settings=settings)
    if name not in MODELS:
        raise ValueError(f"it is not known; there are {', '.join(WIDTHS)}")
    tower = load_feature_tower(model or MODELS[name], device=device)
    repository = f"{tower.origin.get('repo')}@{tower.origin.get('revision')}"
    identity = f"{name} {tower.origin['sha256'][:16] if 'sha256' in tower.origin else repository}"
    return Extractor(
        name, identity, _preparation(name, tower.side), tower, unit=name == CLIP_L14, settings=tower.origin
    )


def _preparation(name: str, side: int) -> Callable[[np.ndarray], np.ndarray]:
    """Choose how a tower that was trained at `side` pixels prepares a picture."""

    def prepared(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels)
        if name == DINOV2:  # dgm-eval: the whole picture, whatever its shape
            return normalised(image.resize((DINOV2_SIDE,) * 2, Image.Resampling.BICUBIC), IMAGENET_MEAN, IMAGENET_STD)
        return normalised((cropped_first if name == CLIP_L14 else cropped)(image, side), CLIP_MEAN, CLIP_STD)

    return prepared


def cropped(image: Image.Image, side: int) -> Image.Image:
    """Resize the short side, bicubic, and crop the centre, as CLIP's own preprocessing."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((side * width // short, side * height // short), Image.Resampling.BICUBIC)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def cropped_first(image: Image.Image, side: int) -> Image.Image:
    """Crop the centre square and resize it, bicubic, as the code of CMMD."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image.crop((left, top, left + short, top + short))
    return square.resize((side, side), Image.Resampling.BICUBIC)


def normalised(image: Image.Image, mean: tuple[float, ...], deviation: tuple[float, ...]) -> np.ndarray:
    """Scale a picture to float32 (3, H, W): (x / 255 - mean) / deviation, by channel."""
    values = np.asarray(image, np.float32) / np.float32(255)
    scaled = (values - np.array(mean, np.float32)) / np.array(deviation, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))
