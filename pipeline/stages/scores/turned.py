"""`scores/turned`: hashes of the picture without its borders, as it is and turned in every way."""

from functools import partial

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
VERSION = 2
NESTED = {1: 1, 2: 8}  # by the stage's version: how many borders, one within the other, are cut


def turned_score_stage(name: str, max_pixels: int, version: int = VERSION) -> RowStage:
    """Make the stage of `scores/turned`: `turned_scores` of the stored image.

    Args:
        version: 1 cuts one border of each side, 2 also a drawing's own margin within the bars.
    """
    spec = ColumnSpec({"stage": "scores/turned", "version": version}, SCALARS, (IMAGES,))
    return pixel_score_stage(name, spec, None, max_pixels, partial(_load, NESTED[version]))


def _load(nested: int) -> PixelFunction:
    return partial(turned_scores, nested=nested)


def turned_scores(pixels: np.ndarray, nested: int = NESTED[VERSION]) -> Scalars:
    """Hash (H, W, 3) uint8 RGB pixels, without at most `nested` borders that lie one within the other.

    - `phashes`: 8 hashes as `phash` of `scores/basic`, 128 hex digits, of the picture without its borders: as it is,
      mirrored left to right, top to bottom, turned by 180 degrees; then the same of the transposed picture
    - `border`: the share of the picture that borders of one colour take
    """
    inner = cut_borders(pixels, nested)
    low = low_frequencies(Image.fromarray(inner).convert("L"))
    return {
        "phashes": "".join(hash_bits(each).tobytes().hex() for each in turned(low)),
        "border": 1 - inner.shape[0] * inner.shape[1] / (pixels.shape[0] * pixels.shape[1]),
    }


def turned(low: np.ndarray) -> list[np.ndarray]:
    """Compute the (8, 8) frequencies of a picture turned in 8 ways: a mirror image has every second one negated."""
    sign = np.where(np.arange(8) % 2, -1.0, 1.0)
    return [f * down[:, None] * across for f in (low, low.T) for down in (sign**2, sign) for across in (sign**2, sign)]


def cut_borders(pixels: np.ndarray, nested: int = NESTED[VERSION]) -> np.ndarray:
    """Cut lines of one colour from all four sides: bars above and below, a frame, a margin within them.

    To cut until nothing is left to cut makes a picture with bars and the picture without them equal: a drawing loses
    its margin in both.
    """
    for _ in range(nested):
        before = pixels.shape
        for _ in range(2):  # rows, then columns
            lines = _border(pixels), _border(pixels[::-1])
            if len(pixels) - sum(lines) >= max(1, LEAST * len(pixels)):
                pixels = pixels[lines[0] : len(pixels) - lines[1]]
            pixels = pixels.swapaxes(0, 1)
        if pixels.shape == before:
            break
    return np.ascontiguousarray(pixels)


def _border(pixels: np.ndarray) -> int:
    """Count the rows from the first one on that have the colour of the first one throughout."""
    colour = np.median(pixels[0], axis=0)
    for start in range(0, len(pixels), BLOCK):
        other = (np.abs(pixels[start : start + BLOCK] - colour) > SAME_COLOUR).any(2).mean(1) > OTHERS
        if other.any():
            return start + int(other.argmax())
    return len(pixels)
