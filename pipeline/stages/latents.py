"""`latents/*`: images through autoencoders, all resolutions and autoencoders from one decode.

The stages of `batch_line`, with batches that are staged in reused buffers: several threads decode into a buffer, and
the GPU copies it from there.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from microdit.model.device import best_device
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.encoders import LatentsColumn
from microdit.pipeline.content.crop import squares
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest
from microdit.pipeline.stages.batch_line import BatchLine, decode_threads
from microdit.pipeline.stages.encoding import Batches, DeviceEvent
from microdit.pipeline.stages.identity import absolute, autoencoder_identity
from microdit.pipeline.stages.latent_batches import (
    ConcurrentShards,
    StagedImage,
    StagingBuffer,
    rows_of_batch,
    staged_batches,
)
from microdit.pipeline.stages.rows import (
    Outcome,
    Output,
    RowFailure,
    ShardRun,
    image_bytes,
    image_failure,
    model_failure,
    open_shard,
)
from microdit.pipeline.stages.stage import ColumnSpec, Task, seed_of

GROUP = 4  # images that change threads together, at most
INFINITE = 0x7C00  # the bits of float16's infinity; those of NaN are above, those of every number below


@dataclass(frozen=True)
class EncodedBatch:
    """Latents of a batch in one column, to be read when the device has come to `ended`."""

    latents: list[np.ndarray | Exception]
    began: DeviceEvent
    ended: DeviceEvent


@dataclass(frozen=True)
class ShardLatents:
    """One shard in progress, with the buffers that no batch is in, and the seconds of the device by column."""

    shard: ShardRun
    free: deque[StagingBuffer]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def write(self, batch: Sequence[StagedImage], encoded: Mapping[str, EncodedBatch]) -> None:
        """Write a batch when the device has encoded it."""
        for column, one in encoded.items():
            one.ended.wait()
            self.seconds[column] += one.ended.seconds_since(one.began)
        self.free.append(batch[0].buffer)  # the GPU has copied all of it
        for column, one in encoded.items():
            for image, latent in zip(batch, one.latents, strict=True):
                self.shard.write_column(column, image.row, _outcome(latent))


class Latents:
    """All latents columns of a config: float16 (C, H, W) per sample, and its largest magnitude `absmax`.

    With the posterior `moments` it is (2C, H, W): means, then standard deviations. An image's short side is resized to
    the resolution (bicubic, antialiased) and the centre is cut out. Batches never cross shards and all have one shape,
    and no column's batches depend on the others that are made with it, so that a shard's bytes can be reproduced.
    Another batch size moves numbers by 0.4% of an image's largest at most, another device by 2% (bfloat16).

    Two threads may run two shards: the second shard's first images are decoded while the first one's last are encoded,
    written and committed, so that a GPU does not wait between them.
    """

    name = "latents"
    device = "gpu"
    at_once = 2

    def __init__(self, columns: Mapping[str, LatentsColumn], max_pixels: int, resources: Resources):
        self._options, self._max_pixels = dict(columns), max_pixels
        self._batch, self._threads = resources.latents_batch, resources.decode_threads
        self.columns: dict[str, ColumnSpec] = {}
        self._origin: dict[str, tuple[str, str | None]] = {}
        for name, options in columns.items():
            model = autoencoder_identity(name, options.autoencoder, options.revision)
            stage = {"stage": "latents", "version": 2, **options.model_dump(), "model": model}
            self.columns[name] = ColumnSpec(stage, {"absmax": "float32"}, (IMAGES,))
            # the worker loads the declared revision, even if the branch has moved since
            self._origin[name] = absolute(options.autoencoder), model.get("revision")
        self.models: dict[str, Any] = {}
        """The loaded autoencoder of each column; columns with the same one share it."""
        self._batches: dict[str, Batches] = {}
        self._shards = ConcurrentShards()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "models": {}, "_batches": {}}

    def load(self) -> None:
        from microdit.model.pretrained.autoencoder import load_autoencoder

        if self.models:
            return
        loaded: dict[tuple[str, str | None], Any] = {}
        for name, options in self._options.items():
            path, revision = origin = self._origin[name]
            if origin not in loaded:
                loaded[origin] = load_autoencoder(path, revision=revision, device=best_device())
            model = loaded[origin]
            if options.resolution % model.downsample:
                raise RequestError(
                    f"columns.{name}.resolution = {options.resolution}: the autoencoder {options.autoencoder} takes "
                    f"multiples of {model.downsample}"
                )
            if options.posterior == "moments" and model.deterministic:
                raise RequestError(
                    f"columns.{name}.posterior = 'moments': the autoencoder {options.autoencoder} is deterministic and "
                    "has none; expected 'mode'"
                )
            # one Batches per column: halving the batch size for one must not change another column's numbers
            self._batches[name] = Batches(model.together(options.resolution, self._batch))
        self.models = {name: loaded[origin] for name, origin in self._origin.items()}

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        images = latest(corpus, IMAGES, task.ref)
        device = next(iter(self.models.values())).device
        with ExitStack() as stack:
            feeding = stack.enter_context(ExitStack())
            feeding.enter_context(self._shards.feeding)
            since = _now()
            shard = stack.enter_context(open_shard(corpus, task, images))
            work = ShardLatents(shard, self._shards.free_buffers(shard.attempts))
            line = stack.enter_context(BatchLine(decode_threads(self._threads, device)))
            batches = self._staged(line, work, device.type == "cuda", feeding.close)
            first = list(islice(batches, 1))  # while the shard before uses the models
            waits = self._shards.encoding.locked()
            with self._shards.encoding:
                since = _now() if waits else since  # the time until then is the other shard's
                line.encode(chain(first, batches), partial(self._encode_batch, device, shard.attempts), work.write)
            line.finish()
            return shard.commit(partial(self._figures, work, since))

    def _figures(self, work: ShardLatents, since: np.ndarray, column: str) -> dict[str, float]:
        passed, worked = (_now() - since).tolist()
        figures = {"encode_seconds": work.seconds[column], "batch": self._batches[column].size}
        return {"seconds": passed, "cpu_seconds": worked, **figures}

    def _staged(
        self, line: BatchLine, work: ShardLatents, pinned: bool, ended: Callable[[], None]
    ) -> Iterator[list[StagedImage]]:
        """Decode the rows into buffers, batch by batch; `ended` is called when the last row is on its way."""
        group = math.gcd(self._batch, GROUP)
        groups = line.read(chunks(work.shard.rows(), group), self._batch // group)
        assigned = self._assigned(work, groups, pinned, ended)
        prepare = partial(self._prepare, work.shard)
        prepared = line.prepare(assigned, prepare, (self._batch + 2 * line.threads) // group)
        return staged_batches(prepared, self._batch // group, work.free)

    def _assigned(
        self, work: ShardLatents, groups: Iterable[list[Row]], pinned: bool, ended: Callable[[], None]
    ) -> Iterator[list[StagedImage]]:
        """Give each row its index in a buffer: a free one for each batch, or a new one."""
        noise = {}
        for column in work.shard.attempts:
            side, model = self._options[column].resolution, self.models[column]
            if self._options[column].posterior == "sample" and not model.deterministic:
                noise[column] = tuple(model.noise([0], side, side).shape[1:])
        sides = {self._options[column].resolution for column in work.shard.attempts}
        index = self._batch
        for rows in groups:
            if index == self._batch:
                buffer = work.free.pop() if work.free else StagingBuffer(self._batch, sides, noise, pinned)
                index = 0
            yield [StagedImage(row, buffer, index + i) for i, row in enumerate(rows)]
            index += len(rows)
        ended()

    def _prepare(self, shard: ShardRun, group: Sequence[StagedImage]) -> tuple[StagingBuffer, list[StagedImage]]:
        """Decode images into their buffer, and draw their noise. What cannot be decoded fails, and is left out."""
        staged = []
        for image in group:
            row, buffer, index = image.row, image.buffer, image.index
            try:
                out = {side: pixels.numpy()[index] for side, pixels in buffer.pixels.items()}
                squares(image_bytes(row.members), out, self._max_pixels)
            except Exception as error:  # this sample fails with it, and no other
                shard.write(row, image_failure(error))
                continue
            for column, noise in buffer.noise.items():
                side = self._options[column].resolution
                seed = seed_of(column, shard.task.ref.source, row.key)
                noise[index] = self.models[column].noise([seed], side, side)[0]
            staged.append(replace(image, row=replace(row, members={})))
        return group[0].buffer, staged

    def _encode_batch(
        self, device: Any, columns: Iterable[str], batch: Sequence[StagedImage]
    ) -> dict[str, EncodedBatch]:
        """Encode one batch in every column."""
        encoded = {}
        for column in columns:
            began = DeviceEvent(device)
            latents = self._batches[column].run(partial(self._encode, column), batch)
            encoded[column] = EncodedBatch(latents, began, DeviceEvent(device))
        return encoded

    def _encode(self, column: str, batch: Sequence[StagedImage], size: int) -> list[np.ndarray]:
        """Encode consecutive samples of a buffer, filled up with black images to `size`: latents (C, h, w) float16.

        On a GPU they may be read after the next `DeviceEvent`, and only then may their buffer be used again.
        """
        import torch

        options, model, buffer = self._options[column], self.models[column], batch[0].buffer
        pinned = model.device.type == "cuda"
        pixels = rows_of_batch(buffer.pixels[options.resolution], batch, size, pinned)
        noise = rows_of_batch(buffer.noise[column], batch, size, pinned) if column in buffer.noise else None
        latents = model.encode(pixels, posterior=options.posterior, noise=noise)[: len(batch)].to(torch.float16)
        copied = torch.empty(latents.shape, dtype=torch.float16, pin_memory=pinned)
        return list(copied.copy_(latents, non_blocking=True).numpy())


def _now() -> np.ndarray:
    """Read the clock and this process' processor time, in seconds."""
    return np.array([time.monotonic(), time.process_time()])


def _outcome(latent: np.ndarray | Exception) -> Outcome:
    if isinstance(latent, Exception):
        return model_failure(latent)
    largest = (latent.view(np.uint16) & 0x7FFF).max()  # without its sign a float16 is ordered as its bits are
    if largest < INFINITE:
        return Output({"absmax": float(largest.view(np.float16))}, {"npy": array_bytes(latent)})
    return RowFailure("not_finite", "the autoencoder gives NaN, or more than float16 holds")
