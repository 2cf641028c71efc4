"""Check drawn pictures, and encode them as ingest stores them."""

import hashlib

import numpy as np

from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import encode, resize, short_side_size
from microdit.pipeline.sources.synthesis.drawing import Drawn, NoPicture

FLAT = 3  # steps of 255 by which the pixels of one colour may differ


class Repeats:
    """Finds pictures that are the same as an earlier one of their prompt."""

    def __init__(self) -> None:
        self._row = -1
        self._seeds: dict[bytes, int] = {}

    def fault(self, row: int, seed: int, pixels: np.ndarray) -> NoPicture | None:
        """Return the fault of a picture that repeats one; all pictures of a prompt come one after the other."""
        if row != self._row:
            self._row, self._seeds = row, {}
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
        first = self._seeds.setdefault(digest, seed)
        if first == seed:
            return None
        return NoPicture("repeated", f"it is the same picture as with the seed {first}")


def check(drawn: Drawn, row: int, seed: int, repeats: Repeats) -> Drawn:
    """Return a drawn picture, or what is wrong with it."""
    if isinstance(drawn, NoPicture):
        return drawn
    if (np.ptp(drawn, axis=(0, 1)) <= FLAT).all():
        return NoPicture("one_colour", f"all of its pixels are about {tuple(drawn[0, 0].tolist())}")
    return repeats.fault(row, seed, drawn) or drawn


def encode_picture(pixels: np.ndarray, options: ImageOptions) -> bytes:
    """Encode a picture in the size, format and quality of the images column, so that ingest keeps its bytes."""
    height, width = pixels.shape[:2]
    if options.max_side is not None and min(width, height) > options.max_side:
        pixels = resize(pixels, short_side_size(width, height, options.max_side))
    return encode(pixels, options)
