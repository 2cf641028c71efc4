"""Resize pictures to Inception's 299 pixels as each of the three tools does that people compare with.

    clean-fid       bicubic with antialiasing, by channel in float32, clipped, not rounded; (x - 128) / 128
    pytorch-fid     bilinear without antialiasing, pixel centres at half; 2 x / 255 - 1
    torch-fidelity  bilinear without antialiasing, as TensorFlow 1: pixel corners at whole numbers; (x - 128) / 128

The three give figures that cannot be compared with each other (Parmar et al., arXiv 2104.11222).
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from microdit.model.pretrained.inception import SIDE


def clean_fid(pixels: np.ndarray) -> np.ndarray:
    """Resize uint8 (H, W, 3) as clean-fid, to float32 (3, 299, 299) of -1 to 1."""
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(channel.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for channel in channels]
    return (np.stack(resized).clip(0, 255) - np.float32(128)) / np.float32(128)


def pytorch_fid(pixels: np.ndarray) -> np.ndarray:
    """Resize uint8 (H, W, 3) as pytorch-fid, to float32 (3, 299, 299) of -1 to 1."""
    batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float() / 255
    resized = functional.interpolate(batch, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return (2 * resized[0] - 1).numpy()


def torch_fidelity(pixels: np.ndarray) -> np.ndarray:
    """Resize uint8 (H, W, 3) as torch-fidelity, to float32 (3, 299, 299) of -1 to 1."""
    rows = _interpolated(pixels.astype(np.float32), 0)
    resized = _interpolated(rows, 1).transpose(2, 0, 1)
    return (np.ascontiguousarray(resized) - np.float32(128)) / np.float32(128)


def _interpolated(values: np.ndarray, axis: int) -> np.ndarray:
    """Interpolate an axis to 299: value `i` lies at `i * length / 299`, between its two neighbours."""
    length = values.shape[axis]
    at = np.arange(SIDE, dtype=np.float32) * np.float32(length / SIDE)
    low = at.astype(np.int64)
    high = np.minimum(low + 1, length - 1)
    share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    below, above = values.take(low, axis), values.take(high, axis)
    result: np.ndarray = below + (above - below) * share
    return result


PROTOCOLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clean-fid": clean_fid,
    "pytorch-fid": pytorch_fid,
    "torch-fidelity": torch_fidelity,
}
