"""Which sample is when in a batch, and how it gets there.

    SampleIndex --> Lanes --> rows of batch n --ShardCache--> Batch

The order: shards in a seeded order, their rows concatenated and cut into C lanes of equal size. Row i of a global
batch belongs to lane i mod C, and the n-th sample of a lane is a function of (seed, lane, n) alone, so the sequence of
samples is a pure function of (seed, samples, batch size) for any number of processes that divides C.
Everything random about row i of step s (noise, sigma, dropout, caption, patches kept) is a function of (seed, s, i).
"""

import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from obstore.exceptions import BaseError
from torch import Tensor

from pipeline.corpus import Commit, Corpus
from pipeline.errors import RequestError
from pipeline.shards import array_from_bytes
from trainer.recipe import Recipe, StageRecipe
from trainer.samples import SampleIndex, Where

# -- in which order --------------------------------------------------------------------------------------------------


def _shuffled(n: int, *seed: int) -> np.ndarray:
    """A permutation of range(n); raw bits and a stable sort, because numpy may change `permutation` but not these."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n), kind="stable")


class Lanes:
    """The order of the samples of an index.

    lanes: wished for; with fewer samples it is the largest divisor of it that leaves none empty.
    window: shards of a lane among which rows are shuffled.
    """

    def __init__(self, index: SampleIndex, lanes: int, seed: int, window: int):
        self.index, self.seed, self.window = index, seed, window
        self.count = max(d for d in range(1, lanes + 1) if lanes % d == 0 and d <= len(index))
        bounds = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))
        by_shard = [np.arange(bounds[s], bounds[s + 1]) for s in _shuffled(len(index.shards), seed, 0)]
        self._samples = np.concatenate(by_shard)
        self._bounds = [len(index) * lane // self.count for lane in range(self.count + 1)]
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}

    def samples(self, lane: int, start: int, count: int) -> np.ndarray:
        """Positions in the index of samples start, start + 1, ... of a lane, without end."""
        size = self._bounds[lane + 1] - self._bounds[lane]
        parts = []
        while count > 0:
            epoch, offset = divmod(start, size)
            part = self._epoch(lane, epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def _epoch(self, lane: int, epoch: int) -> np.ndarray:
        if self._epochs.get(lane, (-1,))[0] != epoch:
            own = self._samples[self._bounds[lane] : self._bounds[lane + 1]]
            pieces = np.split(own, np.flatnonzero(np.diff(self.index.shard[own])) + 1)
            order = _shuffled(len(pieces), self.seed, 1, lane, epoch)
            windows = []
            for number, first in enumerate(range(0, len(pieces), self.window)):
                rows = np.concatenate([pieces[p] for p in order[first : first + self.window]])
                windows.append(rows[_shuffled(len(rows), self.seed, 2, lane, epoch, number)])
            self._epochs[lane] = (epoch, np.concatenate(windows))
        return self._epochs[lane][1]

    def batch(self, seen: int, batch: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """A rank's part of the global batch after `seen` samples: (rows in that batch, positions in the index)."""
        each, own = batch // self.count, self.count // world
        lanes = np.arange(rank * own, (rank + 1) * own)
        positions = np.stack([self.samples(lane, seen // self.count, each) for lane in lanes.tolist()], axis=1)
        return (np.arange(each)[:, None] * self.count + lanes).ravel(), positions.ravel()


# -- from where ------------------------------------------------------------------------------------------------------


class ShardCache:
    """Decoded shards of columns, {row: array}, read in threads and kept up to `max_bytes`, the last used ones."""

    def __init__(self, corpus: Corpus, columns: Mapping[str, Mapping[Where, Commit]], max_bytes: int):
        self.corpus, self.columns, self.max_bytes = corpus, columns, max_bytes
        self.bytes = self.reads = 0
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="shards")
        self._shards: OrderedDict[tuple[str, Where], Future[dict[int, np.ndarray]]] = OrderedDict()
        self._sizes: dict[tuple[str, Where], int] = {}

    def request(self, column: str, where: Where) -> Future[dict[int, np.ndarray]]:
        """Begin to read a shard, if it is not here."""
        key = (column, where)
        if key not in self._shards:
            self.reads += 1
            self._sizes[key] = self.columns[column][where].object.size
            self.bytes += self._sizes[key]
            self._shards[key] = self._pool.submit(self._read, column, where)
        self._shards.move_to_end(key)
        return self._shards[key]

    def get(self, column: str, where: Where) -> dict[int, np.ndarray]:
        return self.request(column, where).result()

    def trim(self) -> None:
        """Forget what was used longest ago until the rest fits; the last one stays."""
        while self.bytes > self.max_bytes and len(self._shards) > 1:
            key, future = self._shards.popitem(last=False)
            future.cancel()
            self.bytes -= self._sizes.pop(key)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read(self, column: str, where: Where) -> dict[int, np.ndarray]:
        commit = self.columns[column][where]
        try:
            sidecar = self.corpus.sidecar(commit)
            data = self.corpus.store.get(commit.object.name)
        except (OSError, BaseError) as error:
            raise RequestError(
                f"column {column}, shard {where[1]}: {commit.object.name} cannot be read: {error}"
            ) from error
        arrays = {}
        for row, status, offset, size in zip(
            *(sidecar[name].to_pylist() for name in ("row", "status", "offset", "size")), strict=True
        ):
            if status == "ok":
                try:
                    arrays[row] = array_from_bytes(data[offset : offset + size])
                except ValueError as error:
                    raise RequestError(
                        f"column {column}, shard {where[1]}, row {row}: {commit.object.name} is damaged ({error}); "
                        "run `microdit verify`, then `microdit build --repair`"
                    ) from error
        return arrays


# -- a batch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, b samples: see `EDM.loss`."""

    rows: Tensor  # int64 (b,), of the global batch
    latents: Tensor  # (b, C, H, W)
    text: Tensor  # (b, L, width), zeros behind the text and for dropped captions
    text_mask: Tensor  # bool (b, L)
    sigma_normal: Tensor  # (b,), standard normal
    noise: Tensor  # (b, C, H, W), standard normal
    permutation: Tensor | None  # int64 (b, T)

    def to(self, device: torch.device) -> "MicroBatch":
        def moved(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

        return replace(self, **{name: moved(x) for name, x in vars(self).items() if x is not None})


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: `positions` in the index, and the same samples in micro-batches."""

    positions: np.ndarray
    micro_batches: list[MicroBatch]


@dataclass(frozen=True)
class Draw:
    """The random numbers of a global batch, drawn by one generator so that no rank's depend on the others."""

    sigma_normal: Tensor
    caption: np.ndarray
    dropout: np.ndarray
    noise: Tensor
    permutation: Tensor | None
    posterior: Tensor | None = None

    @classmethod
    def of(
        cls, seed: int, step: int, batch: int, latent_shape: Sequence[int], tokens: int | None, moments: bool = False
    ) -> "Draw":
        """tokens: length of the permutations of patches; None without masking. moments: latents are drawn as well."""
        words = np.random.SeedSequence((seed, 3, step)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        return cls(
            sigma_normal=torch.randn(batch, generator=generator),
            caption=torch.rand(batch, generator=generator).numpy(),
            dropout=torch.rand(batch, generator=generator).numpy(),
            noise=torch.randn(batch, *latent_shape, generator=generator),
            permutation=None if tokens is None else torch.rand(batch, tokens, generator=generator).argsort(dim=1),
            # the last one, so that the others are the same for every kind of latents
            posterior=torch.randn(batch, *latent_shape, generator=generator) if moments else None,
        )


class StageData:
    """The batches of one stage of a recipe, for one of `world` processes.

    index: what the stage trains on. Raises RequestError if processes and lanes, or text columns, do not agree.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageRecipe,
        index: SampleIndex,
        cache: ShardCache,
        patch_size: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.recipe, self.stage, self.index, self.cache, self.rank, self.world = (
            recipe,
            stage,
            index,
            cache,
            rank,
            world,
        )
        self.lanes = Lanes(index, recipe.lanes, recipe.seed, recipe.shuffle_window)
        if self.lanes.count % world:
            raise RequestError(
                f"{world} processes share {self.lanes.count} lanes of {len(index)} samples: "
                f"the number of processes must divide {self.lanes.count}"
            )
        self.text = sorted(recipe.text)  # what is drawn depends on no order in the file
        self.text_bounds = np.cumsum([recipe.text[name] for name in self.text]) / sum(recipe.text.values())
        self.latent_shape, self.text_width = shapes(cache, index, stage.latents, self.text)
        self.moments = holds_moments(cache.corpus, stage.latents)
        self.tokens = math.prod(self.latent_shape[1:]) // patch_size**2 if stage.mask_ratio > 0 else None

    def batches(self, step: int, seen: int, count: int, ahead: int = 4) -> Iterator[Batch]:
        """`count` batches from step `step` of the run, after `seen` samples; shards are read `ahead` batches before."""
        batch = self.stage.batch
        for s in range(min(ahead, count)):
            self._request(seen + s * batch)
        for s in range(count):
            if s + ahead < count:
                self._request(seen + (s + ahead) * batch)
            yield self._batch(step + s, seen + s * batch)
            self.cache.trim()

    def _request(self, seen: int) -> None:
        _, positions = self.lanes.batch(seen, self.stage.batch, self.rank, self.world)
        for shard in np.unique(self.index.shard[positions]).tolist():
            for column in (self.stage.latents, *self.text):
                self.cache.request(column, self.index.shards[shard])

    def _batch(self, step: int, seen: int) -> Batch:
        rows, positions = self.lanes.batch(seen, self.stage.batch, self.rank, self.world)
        draw = Draw.of(self.recipe.seed, step, self.stage.batch, self.latent_shape, self.tokens, self.moments)
        latents, texts = self._arrays(rows, positions, draw)
        size = self.stage.micro_batch or len(rows)
        order = np.arange(len(rows))
        if size < len(rows):  # texts of like length together: less padding
            order = np.argsort([len(text) for text in texts], kind="stable")
        parts = [order[start : start + size].tolist() for start in range(0, len(rows), size)]
        return Batch(positions, [self._micro_batch(rows, latents, texts, draw, part) for part in parts])

    def _arrays(self, rows: np.ndarray, positions: np.ndarray, draw: Draw) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Latents and texts of these rows; a dropped caption is one token of zeros."""
        index = self.index
        latents, texts = [], []
        columns = np.searchsorted(self.text_bounds, draw.caption[rows], side="right").clip(max=len(self.text) - 1)
        dropped = draw.dropout[rows] < self.recipe.caption_dropout
        nothing = np.zeros((1, self.text_width), dtype=np.float16)
        for position, column, drop in zip(positions.tolist(), columns.tolist(), dropped.tolist(), strict=True):
            where, row = index.shards[index.shard[position]], int(index.row[position])
            latents.append(self.cache.get(self.stage.latents, where)[row])
            texts.append(nothing if drop else self.cache.get(self.text[column], where)[row])
        return latents, texts

    def _micro_batch(
        self, rows: np.ndarray, latents: list[np.ndarray], texts: list[np.ndarray], draw: Draw, part: list[int]
    ) -> MicroBatch:
        text, mask = pad_text([texts[i] for i in part], self.recipe.text_lengths)
        taken = torch.from_numpy(rows[part])
        stacked = torch.from_numpy(np.stack([latents[i] for i in part]))
        if draw.posterior is not None:
            mean, deviation = stacked.float().chunk(2, dim=1)
            stacked = mean + deviation * draw.posterior[taken]
        return MicroBatch(
            rows=taken,
            latents=stacked,
            text=torch.from_numpy(text),
            text_mask=torch.from_numpy(mask),
            sigma_normal=draw.sigma_normal[taken],
            noise=draw.noise[taken],
            permutation=None if draw.permutation is None else draw.permutation[taken],
        )


def shapes(
    cache: ShardCache, index: SampleIndex, latents: str, text: Sequence[str]
) -> tuple[tuple[int, int, int], int]:
    """Shape of a latent (C, H, W) and width of a caption embedding, from the first sample.

    Raises:
        RequestError: text columns of different widths, which one network cannot read.
    """
    where, row = index.shards[index.shard[0]], int(index.row[0])
    widths = {column: cache.get(column, where)[row].shape[1] for column in text}
    if len(set(widths.values())) > 1:
        raise RequestError(f"text: the columns differ in width: {widths}; take columns of one text encoder")
    channels, height, width = cache.get(latents, where)[row].shape
    if holds_moments(cache.corpus, latents):
        channels //= 2
    return (channels, height, width), widths[text[0]]


def holds_moments(corpus: Corpus, latents: str) -> bool:
    """Whether a latents column holds means and standard deviations (2C, H, W), of which each step draws a sample."""
    return bool(corpus.column(latents).stage.get("posterior") == "moments")


def pad_text(texts: Sequence[np.ndarray], lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (tokens, width) -> (b, L, width) with zeros behind, and bool (b, L), True where text is.

    Raises:
        RequestError: a text is longer than the last of `lengths`.
    """
    longest = max(len(text) for text in texts)
    if longest > lengths[-1]:
        raise RequestError(
            f"text_lengths: a caption has {longest} tokens, the last length is {lengths[-1]}; add {longest}"
        )
    length = next(size for size in lengths if size >= longest)
    padded = np.zeros((len(texts), length, texts[0].shape[1]), dtype=texts[0].dtype)
    mask = np.zeros((len(texts), length), dtype=bool)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text
        mask[i, : len(text)] = True
    return padded, mask


def in_thread(batches: Iterator[Batch], depth: int = 3) -> Generator[Batch]:
    """The same batches, made in a thread up to `depth` ahead; its errors are raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again where the batches are taken
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
