"""`latents/*`: images through an autoencoder, all resolutions of it from one decode."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from pipeline.config import LatentsColumn, Resources
from pipeline.corpus import Attempt, Commit, Corpus
from pipeline.errors import RequestError
from pipeline.images import BadImage, decode, resize, short_side_size
from pipeline.parallel import threaded
from pipeline.shards import array_bytes
from pipeline.stages import (
    IMAGES,
    ColumnSpec,
    Row,
    Task,
    attempts,
    commit_all,
    image_bytes,
    latest,
    read_rows,
    samples,
)
from pipeline.stages.models import Batches, absolute, autoencoder_identity, best_device

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
        self._batches, self._threads = Batches(resources.latents_batch), resources.decode_threads
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

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        images = latest(corpus, IMAGES, task.ref)
        resolutions = {self._options[column].resolution for column in task.columns}
        before = self._batches.seconds
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [images])
            rows = samples(read_rows(corpus, images), made, task, IMAGES)
            decoded = threaded(lambda row: (row, self._crops(row, resolutions)), rows, self._threads)
            for batch in chunks(decoded, self._batches.size):
                good: list[tuple[Row, dict[int, np.ndarray]]] = []
                for row, crops in batch:
                    if isinstance(crops, BadImage):
                        for attempt in made.values():
                            attempt.fail(row.row, row.key, crops.reason, str(crops))
                    else:
                        good.append((row, crops))
                for column, attempt in made.items():
                    encode = partial(self._encode, column, task.ref.source)
                    latents = self._batches.run(encode, good)
                    for (row, _), latent in zip(good, latents, strict=True):
                        _write(attempt, row, latent)
            return commit_all(made, task, encode_seconds=self._batches.seconds - before, batch=self._batches.size)

    def _crops(self, row: Row, resolutions: Iterable[int]) -> dict[int, np.ndarray] | BadImage:
        try:
            pixels = decode(image_bytes(row.members), self._max_pixels).pixels
            return {side: square(pixels, side) for side in resolutions}
        except BadImage as error:
            return error
        except Exception as error:  # this sample fails with it, and no other
            return BadImage("damaged", f"{type(error).__name__}: {error}")

    def _encode(
        self, column: str, source: str, good: Sequence[tuple[Row, dict[int, np.ndarray]]], size: int
    ) -> list[np.ndarray]:
        """Latents (C, h, w) float16 of a batch that is filled up with black images to `size`."""
        options = self._options[column]
        pixels = np.zeros((size, options.resolution, options.resolution, 3), np.uint8)
        seeds = [0] * size
        for i, (row, crops) in enumerate(good):
            pixels[i] = crops[options.resolution]
            seeds[i] = seed_of(column, source, row.key)
        latents = self._model.encode(pixels, posterior=options.posterior, seeds=seeds)
        with np.errstate(over="ignore"):
            return list(np.asarray(latents[: len(good)].cpu().numpy(), np.float16))


def _write(attempt: Attempt, row: Row, latent: np.ndarray | Exception) -> None:
    if isinstance(latent, Exception):
        attempt.fail(row.row, row.key, "error", f"{type(latent).__name__}: {latent}")
    elif np.isfinite(absmax := float(np.abs(latent).max())):
        attempt.add(row.row, row.key, {"npy": array_bytes(latent)}, absmax=absmax)
    else:
        attempt.fail(row.row, row.key, "not_finite", "the autoencoder gives NaN, or more than float16 holds")


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
