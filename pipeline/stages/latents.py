"""`latents/*`: images through autoencoders, all of their resolutions from one decode.

committed tar --a thread--> rows --threads--> a batch's pixels, noise --GPU--> latents --a thread--> tars, one for each
column. A batch is made where the GPU copies it from, by several threads at once, and its place is used again.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np

from microdit.model.device import best_device
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import chunks, read_ahead, threaded
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.encoders import LatentsColumn
from microdit.pipeline.content.crop import squares
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import Attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest, read_rows
from microdit.pipeline.stages.encoding import GPU_THREADS, Batches, Mark
from microdit.pipeline.stages.identity import absolute, autoencoder_identity
from microdit.pipeline.stages.latent_batches import Room, Sample, Shared, batched, rows_of_batch
from microdit.pipeline.stages.rows import attempts, fail_image, image_bytes, samples
from microdit.pipeline.stages.stage import ColumnSpec, Task, seed_of

T = TypeVar("T")
GROUP = 4  # images that change threads together, at most
WRITING = 2  # batches that wait for the GPU, or to be written
INFINITE = 0x7C00  # the bits of float16's infinity; those of NaN are above, those of every number below


class Latents:
    """All latents columns of a config: float16 (C, H, W) per sample, and its largest magnitude `absmax`.

    With the posterior `moments` it is (2C, H, W): means, then standard deviations. An image's short side is resized to
    the resolution (bicubic, antialiased) and the centre is cut out. Batches never cross shards and have one shape, the
    last one too, and no column's depend on the others that are made with it, so that a shard's bytes can be made again.
    Another batch size moves numbers by 0.4% of an image's largest at most, another device by 2% (bfloat16).

    Two threads may run two shards: the second one's first images are decoded while the first one's last are encoded,
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
            # a branch may move on between the declaration and a worker's start
            self._origin[name] = absolute(options.autoencoder), model.get("revision")
        self.models: dict[str, Any] = {}
        """The autoencoder of each column, when they are loaded; one that several columns name is there once."""
        self._batches: dict[str, Batches] = {}
        self._shared = Shared()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "models": {}, "_batches": {}}

    def load(self) -> None:
        from microdit.model.pretrained.autoencoder import load_autoencoder

        if self.models:
            return
        loaded: dict[tuple[str, str | None], Any] = {}
        for name, options in self._options.items():
            where, revision = origin = self._origin[name]
            if origin not in loaded:
                loaded[origin] = load_autoencoder(where, revision=revision, device=best_device())
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
            # of its own: what one column had no room for is no matter of another's numbers
            self._batches[name] = Batches(model.together(options.resolution, self._batch))
        self.models = {name: loaded[origin] for name, origin in self._origin.items()}

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        images = latest(corpus, IMAGES, task.ref)
        device = next(iter(self.models.values())).device
        threads = max(self._threads, GPU_THREADS) if device.type == "cuda" else self._threads
        seconds: dict[str, float] = defaultdict(float)
        with ExitStack() as stack:
            feeding = stack.enter_context(ExitStack())
            feeding.enter_context(self._shared.feeding)
            since = _now()
            made = attempts(stack, corpus, task, [images])
            free = self._shared.rooms(made)
            # rows that fail are told to the attempts by other threads than the one that writes; a commit orders them
            rows = samples(read_rows(corpus, images), made, task, IMAGES)
            writer = stack.enter_context(ThreadPoolExecutor(1))
            group = math.gcd(self._batch, GROUP)
            read = stack.enter_context(closing(read_ahead(chunks(rows, group), self._batch // group)))
            placed = self._placed(made, read, free, device.type == "cuda", feeding.close)
            prepare = partial(self._prepare, made, task.ref.source)
            ahead = (self._batch + 2 * threads) // group
            prepared = stack.enter_context(closing(threaded(prepare, placed, threads, ahead)))
            batches = batched(prepared, self._batch // group, free)
            first = list(islice(batches, 1))  # while the shard before has the models
            writing: deque[Future[None]] = deque()
            waits = self._shared.encoding.locked()
            with self._shared.encoding:
                since = _now() if waits else since  # the time until then is the other shard's
                for batch in chain(first, batches):
                    encoded = {}
                    for column in made:
                        began = Mark(device)
                        latents = self._batches[column].run(partial(self._encode, column), batch)
                        encoded[column] = latents, began, Mark(device)
                    writing.append(writer.submit(_write, made, batch, encoded, free, seconds))
                    if len(writing) > WRITING:
                        writing.popleft().result()
            for written in writing:
                written.result()
            if task.rows is not None:  # it was only a trial of them
                return []
            commits = []
            for column, attempt in made.items():
                passed, worked = (_now() - since).tolist()
                figures = {"encode_seconds": seconds[column], "batch": self._batches[column].size}
                commits.append(attempt.commit(seconds=passed, cpu_seconds=worked, **figures))
            return commits

    def _placed(
        self,
        made: Mapping[str, Attempt],
        groups: Iterable[list[Row]],
        free: deque[Room],
        pinned: bool,
        ended: Callable[[], None],
    ) -> Iterator[list[Sample]]:
        """Rows with their places, a room of `free` for each batch, or a new one; `ended` is called behind the last."""
        noise = {}
        for column in made:
            side, model = self._options[column].resolution, self.models[column]
            if self._options[column].posterior == "sample" and not model.deterministic:
                noise[column] = tuple(model.noise([0], side, side).shape[1:])
        sides = {self._options[column].resolution for column in made}
        at = self._batch
        for rows in groups:
            if at == self._batch:
                room, at = free.pop() if free else Room(self._batch, sides, noise, pinned), 0
            yield [Sample(row, room, at + i) for i, row in enumerate(rows)]
            at += len(rows)
        ended()

    def _prepare(self, made: Mapping[str, Attempt], source: str, group: Sequence[Sample]) -> tuple[Room, list[Sample]]:
        """Put what the models take of each image into its place; what cannot be decoded is failed, and left out."""
        there = []
        for sample in group:
            row, room, place = sample.row, sample.room, sample.place
            try:
                out = {side: pixels.numpy()[place] for side, pixels in room.pixels.items()}
                squares(image_bytes(row.members), out, self._max_pixels)
            except Exception as error:  # this sample fails with it, and no other
                fail_image(made.values(), row, error)
                continue
            for column, noise in room.noise.items():
                side = self._options[column].resolution
                noise[place] = self.models[column].noise([seed_of(column, source, row.key)], side, side)[0]
            there.append(replace(sample, row=replace(row, members={})))
        return group[0].room, there

    def _encode(self, column: str, batch: Sequence[Sample], size: int) -> list[np.ndarray]:
        """Latents (C, h, w) float16 of samples that follow each other, filled up with black images to `size`.

        On a GPU they may be read after the next `Mark`, and only then may their room be used again.
        """
        import torch

        options, model, room = self._options[column], self.models[column], batch[0].room
        pinned = model.device.type == "cuda"
        pixels = rows_of_batch(room.pixels[options.resolution], batch, size, pinned)
        noise = rows_of_batch(room.noise[column], batch, size, pinned) if column in room.noise else None
        latents = model.encode(pixels, posterior=options.posterior, noise=noise)[: len(batch)].to(torch.float16)
        found = torch.empty(latents.shape, dtype=torch.float16, pin_memory=pinned)
        return list(found.copy_(latents, non_blocking=True).numpy())


def _now() -> np.ndarray:
    """Seconds of the clock, and of this process' work."""
    return np.array([time.monotonic(), time.process_time()])


Encoded = tuple[list[np.ndarray | Exception], Mark, Mark]  # a batch's latents, and when the device did them


def _write(
    made: Mapping[str, Attempt],
    batch: Sequence[Sample],
    encoded: Mapping[str, Encoded],
    free: deque[Room],
    seconds: dict[str, float],
) -> None:
    for column, (_, began, ended) in encoded.items():
        ended.wait()
        seconds[column] += ended.seconds_since(began)
    free.append(batch[0].room)  # the GPU has copied all of it
    for column, (latents, _, _) in encoded.items():
        for sample, latent in zip(batch, latents, strict=True):
            _write_one(made[column], sample.row, latent)


def _write_one(attempt: Attempt, row: Row, latent: np.ndarray | Exception) -> None:
    if isinstance(latent, Exception):
        attempt.fail(row.row, row.key, "error", f"{type(latent).__name__}: {latent}")
        return
    largest = (latent.view(np.uint16) & 0x7FFF).max()  # without its sign a float16 is ordered as its bits are
    if largest < INFINITE:
        attempt.add(row.row, row.key, {"npy": array_bytes(latent)}, absmax=float(largest.view(np.float16)))
    else:
        attempt.fail(row.row, row.key, "not_finite", "the autoencoder gives NaN, or more than float16 holds")
