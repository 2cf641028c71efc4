"""Scores by a function of the pixels, and the first of them, `scores/basic`: what can be said without a model."""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from microdit.pipeline.content.images import BadImage, decode
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest, read_rows
from microdit.pipeline.stages.rows import attempts, commit_all, image_bytes, samples
from microdit.pipeline.stages.stage import ColumnSpec, Task

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


class PixelScores:
    """Scores of the stored image by a function of its pixels, uint8 (H, W, 3), one picture after the other.

    load: gives that function; called once per process, and picklable.
    """

    device: str | None = "cpu"
    """None for a function that is no model."""

    def __init__(
        self,
        name: str,
        stage: dict[str, Any],
        scalars: dict[str, str],
        max_pixels: int,
        load: Callable[[], Callable[[np.ndarray], dict[str, Any]]],
    ):
        self.name = name
        self.columns = {name: ColumnSpec(stage, scalars, (IMAGES,))}
        self._max_pixels, self._load = max_pixels, load
        self._score: Callable[[np.ndarray], dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_score": None}

    def load(self) -> None:
        self._score = self._score or self._load()

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        images = latest(corpus, IMAGES, task.ref)
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [images])
            for row in samples(read_rows(corpus, images), made, task, IMAGES):
                scores = self._scores(row)
                for attempt in made.values():
                    if isinstance(scores, BadImage):
                        attempt.fail(row.row, row.key, scores.reason, str(scores))
                    else:
                        attempt.add(row.row, row.key, **scores)
            return commit_all(made, task)

    def _scores(self, row: Row) -> dict[str, Any] | BadImage:
        assert self._score is not None
        try:
            pixels = decode(image_bytes(row.members), self._max_pixels).pixels
        except BadImage as error:
            return error
        except Exception as error:  # this sample fails with it, and no other
            return BadImage("damaged", f"{type(error).__name__}: {error}")
        try:
            return self._score(pixels)
        except Exception as error:
            return BadImage("error", f"{type(error).__name__}: {error}")


class BasicScores(PixelScores):
    """`scores/basic`: size, aspect (width / height), and what else `basic_scores` gives."""

    device = None

    def __init__(self, name: str, max_pixels: int):
        super().__init__(name, {"stage": "scores/basic", "version": 1}, SCALARS, max_pixels, _basic)


def _basic() -> Callable[[np.ndarray], dict[str, Any]]:
    return basic_scores


def basic_scores(pixels: np.ndarray) -> dict[str, Any]:
    """The scores of (H, W, 3) uint8 RGB pixels.

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
    """The DCT hash: which of the 8x8 lowest frequencies of the 32x32 picture lie above their median.

    The zero frequency stays out of the median. What lies within 2 gray levels of the median counts as below it: in a
    symmetric drawing half of the frequencies are zero, and JPEG would throw a coin for each of them.
    64 bits as 16 hex digits, row by row, the first bit highest.
    """
    small = np.asarray(luma.resize((32, 32), Image.Resampling.BICUBIC), np.float64)
    low = (_dct8() @ small @ _dct8().T).ravel()
    bits = low > np.sort(low[1:])[31] + HASH_MARGIN
    return np.packbits(bits).tobytes().hex()


@lru_cache(maxsize=1)
def _dct8() -> np.ndarray:
    """The first 8 rows of the orthonormal DCT-II matrix of size 32."""
    k, n = np.arange(8)[:, None], np.arange(32)[None, :]
    matrix = np.cos(np.pi * (2 * n + 1) * k / 64) * np.sqrt(2 / 32)
    matrix[0] /= np.sqrt(2)
    return matrix


def _laplacian_variance(luma: np.ndarray) -> float:
    """0 for a picture without an inner pixel."""
    if min(luma.shape) < 3:
        return 0.0
    values = luma.astype(np.float32)
    inner = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * values[1:-1, 1:-1]
    return float(inner.var(dtype=np.float64))
