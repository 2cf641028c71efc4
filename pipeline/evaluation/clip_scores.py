"""Score pictures against their captions by CLIP, in the three conventions that people publish.

    name                     network                                  before the caption    value
    clip-score-torchmetrics  ViT-L/14 of OpenAI                       nothing               100 cos, at least 0
    clip-score-hessel        ViT-B/32 of OpenAI                       "A photo depicts "    2.5 max(cos, 0)
    clip-score-mlperf        ViT-H/14 of LAION-2B                     nothing               cos

They are three numbers of three scales: 0.31, 0.77 and 31 can be of the same pictures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from microdit.model.pretrained.feature_towers import FeatureTower, load_feature_tower
from microdit.model.pretrained.hub import ModelFilesError
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.evaluation.features import BATCH, CLIP_MEAN, CLIP_STD, cropped, normalised


@dataclass(frozen=True)
class Convention:
    """Define how a CLIP score is made of cosines."""

    model: str
    prefix: str = ""
    factor: float = 1.0
    each_at_least_0: bool = False
    mean_at_least_0: bool = False


CONVENTIONS = {
    "clip-score-torchmetrics": Convention("openai/clip-vit-large-patch14", factor=100.0, mean_at_least_0=True),
    "clip-score-hessel": Convention(
        "openai/clip-vit-base-patch32", "A photo depicts ", factor=2.5, each_at_least_0=True
    ),
    "clip-score-mlperf": Convention("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
}


def clip_score(
    name: str,
    pictures: Iterable[np.ndarray],
    captions: Sequence[str],
    model: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, object]:
    """Compute a CLIP score: its value, its standard error over the pictures, and how it was made.

    Args:
        pictures: uint8 (H, W, 3), one for each caption.
        model: a folder or hub repository in place of the convention's.

    Raises:
        RequestError: the model cannot be had.
    """
    convention = CONVENTIONS[name]
    try:
        tower = load_feature_tower(model or convention.model, captions=True, device=device)
    except (ModelFilesError, ValueError) as error:
        raise RequestError(f"metric {name!r}: {error}") from error
    cosines = _cosines(tower, pictures, [convention.prefix + caption for caption in captions])
    scores = convention.factor * (np.maximum(cosines, 0) if convention.each_at_least_0 else cosines)
    value = float(scores.mean())
    return {
        "value": max(value, 0.0) if convention.mean_at_least_0 else value,
        "error": float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None,
        "prefix": convention.prefix,
        "factor": convention.factor,
        "model": tower.origin,
    }


def _cosines(tower: FeatureTower, pictures: Iterable[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Compute the cosine of each picture and its caption, float64 (N,)."""
    from PIL import Image

    device = next(tower.parameters()).device
    found = []
    for batch in chunks(zip(pictures, captions, strict=True), BATCH):
        prepared = [
            normalised(cropped(Image.fromarray(pixels), tower.side), CLIP_MEAN, CLIP_STD) for pixels, _ in batch
        ]
        with torch.inference_mode():
            seen = tower(torch.from_numpy(np.stack(prepared)).to(device)).float().cpu().numpy()
        read = tower.read([caption for _, caption in batch])
        norms = np.linalg.norm(seen, axis=1) * np.linalg.norm(read, axis=1)
        found.append((seen.astype(np.float64) * read).sum(1) / norms)
    return np.concatenate(found)
