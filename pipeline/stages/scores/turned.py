"""`scores/turned`: hashes of the picture without its borders, as it is and turned in every way."""

import numpy as np
from PIL import Image

from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.stages.row_stage import RowStage
from microdit.pipeline.stages.rows import Scalars
from microdit.pipeline.stages.scores.pixels import PixelFunction, hash_bits, low_frequencies, pixel_score_stage
from microdit.pipeline.stages.stage import ColumnSpec

SCALARS = {"phashes": "string", "border": "float32"}

SAME_COLOUR = 16  # of 255, how far a border's pixels may be from its colour: JPEG's noise
OTHERS = 0.01  # the share of a border's pixels, line by line, that may be of another colour
BLOCK = 16  # lines at a time
LEAST = 1 / 3  # of a side that is left; where more would be cut, nothing is


def turned_score_stage(name: str, max_pixels: int) -> RowStage:
    """The stage of `scores/turned`: `turned_scores` of the stored image."""
    spec = ColumnSpec({"stage": "scores/turned", "version": 1}, SCALARS, (IMAGES,))
    return pixel_score_stage(name, spec, None, max_pixels, _load)


def _load() -> PixelFunction:
    return turned_scores


def turned_scores(pixels: np.ndarray) -> Scalars:
    """Hash (H, W, 3) uint8 RGB pixels.

    - `phashes`: 8 hashes as `phash` of `scores/basic`, 128 hex digits, of the picture without its borders: as it is,
      mirrored left to right, top to bottom, turned by 180 degrees; then the same of the transposed picture
    - `border`: the share of the picture that borders of one colour take
    """
    inner = cut_borders(pixels)
    low = low_frequencies(Image.fromarray(inner).convert("L"))
    return {
        "phashes": "".join(hash_bits(each).tobytes().hex() for each in turned(low)),
        "border": 1 - inner.shape[0] * inner.shape[1] / (pixels.shape[0] * pixels.shape[1]),
    }


def turned(low: np.ndarray) -> list[np.ndarray]:
    """Compute the (8, 8) frequencies of a picture turned in 8 ways: a mirror image has every second one negated."""
    sign = np.where(np.arange(8) % 2, -1.0, 1.0)
    return [f * down[:, None] * across for f in (low, low.T) for down in (sign**2, sign) for across in (sign**2, sign)]


def cut_borders(pixels: np.ndarray) -> np.ndarray:
    """Cut lines of one colour from all four sides: bars above and below, a frame."""
    for _ in range(2):  # rows, then columns
        lines = _border(pixels), _border(pixels[::-1])
        if len(pixels) - sum(lines) >= max(1, LEAST * len(pixels)):
            pixels = pixels[lines[0] : len(pixels) - lines[1]]
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


def _border(pixels: np.ndarray) -> int:
    """Count the rows from the first one on that have the colour of the first one throughout."""
    colour = np.median(pixels[0], axis=0)
    for start in range(0, len(pixels), BLOCK):
        other = (np.abs(pixels[start : start + BLOCK] - colour) > SAME_COLOUR).any(2).mean(1) > OTHERS
        if other.any():
            return start + int(other.argmax())
    return len(pixels)
