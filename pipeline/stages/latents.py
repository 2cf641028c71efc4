"""`latents/*`: images through an autoencoder, all resolutions of it from one decode."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from pipeline.config import LatentsColumn, Resources
from pipeline.corpus import Commit, Corpus, ShardRef
from pipeline.errors import RequestError
from pipeline.images import BadImage, decode, resize, short_side_size
from pipeline.parallel import threaded
from pipeline.shards import array_bytes
from pipeline.stages import IMAGES, ColumnSpec, Row, attempts, fail_upstream, image_bytes, latest, read_rows
from pipeline.stages.models import absolute, autoencoder_identity, best_device

T = TypeVar("T")


class Latents:
    """The latents columns of one autoencoder: float16 (C, H, W) per sample, and its largest magnitude `absmax`.

    An image's short side is resized to the resolution (bicubic, antialiased) and the centre is cut out. Batches never
    cross shards and have one shape, the last one too, so that a shard's bytes can be made again.
    """

    device = "gpu"

    def __init__(self, columns: Mapping[str, LatentsColumn], max_pixels: int, resources: Resources):
        column, first = next(iter(columns.items()))
        model = autoencoder_identity(column, first.autoencoder, first.revision)
        # a branch may move on between the declaration and a worker's start
        self._autoencoder, self._revision = absolute(first.autoencoder), model.get("revision")
        self._options, self._max_pixels = dict(columns), max_pixels
        self._batch, self._threads = resources.latents_batch, resources.decode_threads
        self.name = f"latents:{first.autoencoder}"
        self.columns = {
            name: ColumnSpec(
                {"stage": "latents", "version": 1, **options.model_dump(), "model": model},
                {"absmax": "float32"},
                (IMAGES,),
            )
            for name, options in columns.items()
        }
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def load(self) -> None:
        from model.autoencoder import load_autoencoder

        if self._model is not None:
            return
        model = load_autoencoder(self._autoencoder, revision=self._revision, device=best_device())
        for column, options in self._options.items():
            if options.resolution % model.downsample:
                raise RequestError(
                    f"columns.{column}.resolution = {options.resolution}: the autoencoder {self._autoencoder} takes "
                    f"multiples of {model.downsample}"
                )
        self._model = model

    def run(self, corpus: Corpus, ref: ShardRef, columns: Sequence[str]) -> list[Commit]:
        self.load()
        images = latest(corpus, IMAGES, ref)
        resolutions = {self._options[column].resolution for column in columns}
        seconds = dict.fromkeys(columns, 0.0)
        with ExitStack() as stack:
            made = attempts(stack, corpus, ref, columns, [images])
            rows = threaded(lambda row: (row, self._crops(row, resolutions)), read_rows(corpus, images), self._threads)
            for batch in chunks(rows, self._batch):
                good: list[tuple[Row, dict[int, np.ndarray]]] = []
                for row, crops in batch:
                    if crops is None:
                        fail_upstream(made, row.scalars, IMAGES)
                    elif isinstance(crops, BadImage):
                        for attempt in made.values():
                            attempt.fail(row.row, row.key, crops.reason, str(crops))
                    else:
                        good.append((row, crops))
                for column, attempt in made.items():
                    began = time.monotonic()
                    latents = self._encode(column, ref.source, good)
                    seconds[column] += time.monotonic() - began
                    for (row, _), latent in zip(good, latents, strict=True):
                        absmax = float(np.abs(latent).max())
                        if np.isfinite(absmax):
                            attempt.add(row.row, row.key, {"npy": array_bytes(latent)}, absmax=absmax)
                        else:
                            detail = "the autoencoder gives NaN, or more than float16 holds"
                            attempt.fail(row.row, row.key, "not_finite", detail)
            return [a.commit(encode_seconds=seconds[column], batch=self._batch) for column, a in made.items()]

    def _crops(self, row: Row, resolutions: Iterable[int]) -> dict[int, np.ndarray] | BadImage | None:
        if not row.ok:
            return None
        try:
            pixels = decode(image_bytes(row.members), self._max_pixels).pixels
        except BadImage as error:
            return error
        return {side: square(pixels, side) for side in resolutions}

    def _encode(self, column: str, source: str, good: Sequence[tuple[Row, dict[int, np.ndarray]]]) -> list[np.ndarray]:
        """Latents (C, h, w) float16 of a batch that is filled up with black images."""
        if not good:
            return []
        options = self._options[column]
        pixels = np.zeros((self._batch, options.resolution, options.resolution, 3), np.uint8)
        seeds = [0] * self._batch
        for i, (row, crops) in enumerate(good):
            pixels[i] = crops[options.resolution]
            seeds[i] = seed_of(column, source, row.key)
        latents = self._model.encode(pixels, posterior=options.posterior, seeds=seeds)
        with np.errstate(over="ignore"):
            return list(np.asarray(latents[: len(good)].cpu().numpy(), np.float16))


def seed_of(column: str, source: str, key: str) -> int:
    """The seed of a sample's posterior in a column: 63 bits of the SHA-256 of `<column> LF <source>/<key>`."""
    digest = hashlib.sha256(f"{column}\n{source}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def square(pixels: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 to (side, side, 3): the short side resized, bicubic and antialiased, and the centre cut out."""
    pixels = resize(pixels, short_side_size(pixels.shape[1], pixels.shape[0], side))
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
