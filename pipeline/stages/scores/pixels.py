"""Scores of the stored image by a function of its pixels; the first of them is `scores/basic`, without a model."""

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from microdit.pipeline.content.images import decode
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.rows import Row
from microdit.pipeline.stages.row_stage import Compute, RowStage
from microdit.pipeline.stages.rows import Scalars, image_bytes, image_failure, model_failure
from microdit.pipeline.stages.stage import ColumnSpec

SCALARS = {
    "width": "int32",
    "height": "int32",
    "aspect": "float32",
    "sharpness": "float32",
    "entropy": "float32",
    "red": "float32",
    "green": "float32",
    "blue": "float32",
    "pixels_sha256": "string",
    "phash": "string",
}

HASH_MARGIN = 2.0
SHARPNESS_SIDE = 512  # the long side of the version that sharpness is measured on, so that sizes can be compared


PixelFunction = Callable[[np.ndarray], Scalars]
"""The scores of pixels, uint8 (H, W, 3)."""


def basic_score_stage(name: str, max_pixels: int) -> RowStage:
    """Make the stage of `scores/basic`: `basic_scores` of the stored image."""
    spec = ColumnSpec({"stage": "scores/basic", "version": 1}, SCALARS, (IMAGES,))
    return pixel_score_stage(name, spec, None, max_pixels, _load_basic)


def pixel_score_stage(
    name: str, spec: ColumnSpec, device: str | None, max_pixels: int, load: Callable[[], PixelFunction]
) -> RowStage:
    """Make a stage that scores one image after the other.

    Args:
        device: `cpu` for a model, None for a plain function.
        load: returns the function; picklable, called once per process.
    """
    return RowStage(name, spec, device, partial(_load_scorer, max_pixels, load))


def _load_scorer(max_pixels: int, load: Callable[[], PixelFunction]) -> Compute:
    return partial(_score_row, max_pixels, load())


def _score_row(max_pixels: int, score: PixelFunction, row: Row) -> Scalars:
    try:
        pixels = decode(image_bytes(row.members), max_pixels).pixels
    except Exception as error:  # this sample fails with it, and no other
        raise image_failure(error) from error
    try:
        return score(pixels)
    except Exception as error:
        raise model_failure(error) from error


def _load_basic() -> PixelFunction:
    return basic_scores


def basic_scores(pixels: np.ndarray) -> Scalars:
    """Score (H, W, 3) uint8 RGB pixels.

    - `sharpness`: the variance of the Laplacian (4 neighbours) of the luma, the long side reduced to 512 pixels
    - `entropy`: of the luma's histogram of 256 bins, in bits (0 to 8)
    - `red`, `green`, `blue`: their means over the pixels (0 to 255)
    - `pixels_sha256`: of the pixels' bytes, row by row, as 64 hex digits, after `<width>x<height>:`
    - `phash`: 64-bit perceptual hash as 16 hex digits; near-equal pictures differ in few bits
    """
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    luma = image.convert("L")
    counts = np.array(luma.histogram(), np.float64)
    shares = counts[counts > 0] / counts.sum()
    scale = SHARPNESS_SIDE / max(width, height)
    small = luma
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = luma.resize(size, Image.Resampling.BICUBIC)
    digest = hashlib.sha256(f"{width}x{height}:".encode())
    digest.update(pixels.tobytes())
    red, green, blue = pixels.mean((0, 1)).tolist()
    return {
        "width": width,
        "height": height,
        "aspect": width / height,
        "sharpness": _laplacian_variance(np.asarray(small)),
        "entropy": float(-(shares * np.log2(shares)).sum()) + 0.0,
        "red": red,
        "green": green,
        "blue": blue,
        "pixels_sha256": digest.hexdigest(),
        "phash": perceptual_hash(luma),
    }


def perceptual_hash(luma: Image.Image) -> str:
    """Compute the DCT hash: which of the 8x8 lowest frequencies of the 32x32 picture lie above their median.

    The zero frequency stays out of the median. Frequencies within 2 gray levels of the median count as below it: in a
    symmetric drawing half of them are zero, and JPEG noise would decide the bit of each.

    Returns:
        str: 64 bits as 16 hex digits, row by row, the first bit highest.
    """
    return hash_bits(low_frequencies(luma)).tobytes().hex()


def low_frequencies(luma: Image.Image) -> np.ndarray:
    """Compute the 8x8 lowest frequencies of the picture reduced to 32x32."""
    small = np.asarray(luma.resize((32, 32), Image.Resampling.BICUBIC), np.float64)
    frequencies: np.ndarray = _dct8() @ small @ _dct8().T
    return frequencies


def hash_bits(frequencies: np.ndarray) -> np.ndarray:
    """Compute the 8 bytes of `perceptual_hash` from (8, 8) frequencies."""
    low = frequencies.ravel()
    return np.packbits(low > np.sort(low[1:])[31] + HASH_MARGIN)


@lru_cache(maxsize=1)
def _dct8() -> np.ndarray:
    """Compute the first 8 rows of the orthonormal DCT-II matrix of size 32."""
    k, n = np.arange(8)[:, None], np.arange(32)[None, :]
    matrix = np.cos(np.pi * (2 * n + 1) * k / 64) * np.sqrt(2 / 32)
    matrix[0] /= np.sqrt(2)
    return matrix


def _laplacian_variance(luma: np.ndarray) -> float:
    """Compute the variance of the Laplacian (4 neighbours) of (H, W) uint8 luma; 0 without an inner pixel."""
    if min(luma.shape) < 3:
        return 0.0
    values = luma.astype(np.float32)
    inner = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * values[1:-1, 1:-1]
    return float(inner.var(dtype=np.float64))
