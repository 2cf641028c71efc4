"""Crop a square of a given size from an image."""

from collections.abc import Mapping

import numpy as np

from microdit.pipeline.content.decoded import Decoded
from microdit.pipeline.content.images import decode, short_side_size
from microdit.pipeline.content.jpeg import SHRINK_MARGIN


def squares(data: bytes, out: Mapping[int, np.ndarray], max_pixels: int) -> None:
    """Write `square` of an image for each side of `out` into its array, uint8 (side, side, 3).

    The image is decoded once, a JPEG at a fraction of its size where that is enough. The fraction depends on the image
    and the side alone, so that no column's numbers depend on which others are made with it. Sides that need another
    fraction cost a decode each, which is cheaper than resizing a large picture.

    Raises:
        BadImage: as `decode`.
    """
    image: Decoded | None = None
    for side in sorted(out, reverse=True):
        if image is None or not _serves(image, side):
            image = decode(data, max_pixels, side)
        out[side][:] = _centre(image, side)


def _serves(image: Decoded, side: int) -> bool:
    """Check that `decode(data, max_pixels, side)` would give these very pixels: one eighth smaller is too small."""
    short = min(image.width, image.height)
    if image.format != "jpeg" or not image.plain or short < 2 * side * SHRINK_MARGIN:
        return image.scale == 1
    eighths = round(8 * image.scale)
    return image.scale < 1 and -(-short * (eighths - 1) // 8) < int(side * SHRINK_MARGIN)


def square(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resize the short side of (H, W, 3) uint8, bicubic and antialiased, and crop the centre: (side, side, 3)."""
    height, width = pixels.shape[:2]
    return _centre(Decoded(pixels, width, height, "", plain=True), side)


def _centre(image: Decoded, side: int) -> np.ndarray:
    """Cut the `square` of an image, which may have been decoded at a fraction of its size."""
    size = short_side_size(image.width, image.height, side)
    left, top = ((length - side) // 2 for length in size)
    if image.scale == 1 and size == (image.width, image.height):
        return image.pixels[top : top + side, left : left + side]
    # at a fraction the last row and column may be half beyond the picture
    across, down = image.width * image.scale, image.height * image.scale
    x, y = across / size[0], down / size[1]  # pixels for one of the result's; only the crop is resized
    box = (left * x, top * y, min((left + side) * x, across), min((top + side) * y, down))
    return image.resized((side, side), box)
