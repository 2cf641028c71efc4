"""The batches of a leg, and how they get there.

    SampleIndex --> Lanes (order.py) --> rows of batch n --NotingShardCache--> Batch

Everything random about row i of step s (noise, sigma, dropout, caption, patches kept) is a function of (seed, s, i).
A sample that turns out broken is replaced from its own lane, so that the processes need not agree on anything.
"""

import math
from collections.abc import Generator, Iterator

import numpy as np
import torch

from microdit.pipeline.base.buffers import Buffers
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import read_ahead
from microdit.pipeline.corpus.open_shard import BrokenError, is_finite
from microdit.pipeline.corpus.quantised import Field
from microdit.pipeline.corpus.shard_cache import ShardId
from microdit.pipeline.selection.broken_samples import WHOLE, NotingShardCache
from microdit.pipeline.selection.run_samples import commit_sizes
from microdit.pipeline.selection.sample_index import SampleIndex
from microdit.pipeline.selection.sample_shapes import holds_moments, sample_shape
from microdit.trainer.data.batch import Batch, MicroBatch, pad_text
from microdit.trainer.data.order import Lanes
from microdit.trainer.data.randomness import Draw, Noise
from microdit.trainer.data.samples import local_room
from microdit.trainer.recipe import LegRecipe, Recipe

AHEAD = 4  # batches before it is used, a shard is asked for at least
MADE_AHEAD = 4  # batches that are made before the network takes them
MOST_TRIES = 1000  # samples of a lane that are asked for in place of a broken one


class LegData:
    """The batches of one leg of a recipe, for one of `world` processes.

    index: what the leg trains on. Raises RequestError if processes and lanes, or text columns, do not agree.
    """

    def __init__(
        self,
        recipe: Recipe,
        leg: LegRecipe,
        index: SampleIndex,
        cache: NotingShardCache,
        patch_size: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.recipe, self.leg, self.index, self.cache = recipe, leg, index, cache
        self.rank, self.world = rank, world
        self.lanes = Lanes(index, recipe.lanes, recipe.seed, recipe.shuffle_window)
        if self.lanes.count % world:
            raise RequestError(
                f"{world} processes share {self.lanes.count} lanes of {len(index)} samples: "
                f"the number of processes must divide {self.lanes.count}"
            )
        self.text = sorted(recipe.text)  # what is drawn depends on no order in the file
        self.text_bounds = np.cumsum([recipe.text[name] for name in self.text]) / sum(recipe.text.values())
        self.latent_shape, self.text_width = sample_shape(cache, index, leg.latents, self.text)
        self.moments = holds_moments(cache, leg.latents)
        self._no_text, self._broken_before = np.zeros((1, self.text_width), dtype=np.float16), 0
        self._buffers, self._spread = Buffers(), self._room()
        self.tokens = math.prod(self.latent_shape[1:]) // patch_size**2 if leg.mask_ratio > 0 else None

    def batches_ahead(self, step: int, seen: int, count: int) -> Generator[Batch]:
        """Make the same batches as `batches` in a thread, before they are asked for."""
        return read_ahead(self.batches(step, seen, count), MADE_AHEAD)

    def batches(self, step: int, seen: int, count: int) -> Iterator[Batch]:
        """Make `count` batches from step `step` of the run, after `seen` samples."""
        own = self.lanes.count // self.world
        each, start = self.leg.batch // self.lanes.count, seen // self.lanes.count
        ahead = {}  # batches before it is used, a lane's shard is asked for
        for i in range(own):
            lane = self.rank * own + i
            # all lanes begin their windows at about the same time; to read them all then would be to wait
            ahead[lane] = AHEAD + int(self._spread * (i + 1) / own * self.lanes.window_size(lane, start) / each)
            self._request(lane, start, min(AHEAD, count) * each)
        for lane, first in ahead.items():
            self._request(lane, start + AHEAD * each, (min(first, count) - AHEAD) * each)
        for s in range(count):
            for lane, first in ahead.items():
                if s + first < count:
                    self._request(lane, start + (s + first) * each, each)
            yield self._batch(step + s, seen + s * self.leg.batch)
            self.cache.trim()

    def _request(self, lane: int, start: int, count: int) -> None:
        """Begin to read the shards of some samples of a lane, in their order."""
        if count <= 0:
            return
        for number in dict.fromkeys(self.index.shard[self.lanes.samples(lane, start, count)].tolist()):
            shard = self.index.shards[number]
            for column in (self.leg.latents, *self.text):
                if self.cache.broken.why(column, shard) is None:
                    self.cache.request(column, shard)

    def _room(self) -> float:
        """Compute how much of another window there is room for, 0 to 1. Raises as `CacheRoom.spread`."""
        if self.cache.corpus.store.root is not None:
            return 1.0
        sizes = {column: commit_sizes(self.cache.columns[column]) for column in (self.leg.latents, *self.text)}
        own, disk, memory = self.lanes.count // self.world, self.cache.reader.disk, self.cache.max_bytes
        room = local_room(own, self.lanes.window, self.world, memory, None if disk is None else disk.max_bytes)
        return room.spread(sizes, self.lanes.count)

    def _batch(self, step: int, seen: int) -> Batch:
        rows, positions = self.lanes.batch(seen, self.leg.batch, self.rank, self.world)
        draw = Draw.of(self.recipe.seed, step, self.leg.batch, rows)
        positions, latents, texts = self._samples(seen, rows, positions, draw)
        size = self.leg.micro_batch or len(rows)
        order = np.arange(len(rows))
        if size < len(rows):  # texts of like length together: less padding
            order = np.argsort([len(text) for text in texts], kind="stable")
        parts = [order[start : start + size].tolist() for start in range(0, len(rows), size)]
        return Batch(positions, [self._micro_batch(step, rows, latents, texts, draw, part) for part in parts])

    def _samples(
        self, seen: int, rows: np.ndarray, positions: np.ndarray, draw: Draw
    ) -> tuple[np.ndarray, list[Field], list[Field]]:
        """Read positions, latents and texts of these rows; a dropped caption is one token of zeros."""
        latents, texts, taken = [], [], positions.tolist()
        columns = np.searchsorted(self.text_bounds, draw.caption, side="right").clip(max=len(self.text) - 1)
        dropped = draw.dropout < self.recipe.caption_dropout
        for i, (row, number, drop) in enumerate(zip(rows.tolist(), columns.tolist(), dropped.tolist(), strict=True)):
            column, tries = None if drop else self.text[number], 0
            while True:
                try:
                    shard, shard_row = self.index.locate(taken[i])
                    latent = self._field(self.leg.latents, shard, shard_row)
                    text = self._no_text if column is None else self._field(column, shard, shard_row)
                    break
                except BrokenError as error:
                    self._refuse_too_many()
                    tries += 1
                    if tries > MOST_TRIES:
                        raise RequestError(
                            f"lane {row % self.lanes.count}: no sample of it can be read, the last because {error}; "
                            "run `microdit verify`, then `microdit build --repair`"
                        ) from None
                    taken[i] = self.lanes.replacement(seen, row, tries)
            latents.append(latent)
            texts.append(text)
        return np.array(taken), latents, texts

    def _field(self, column: str, shard: ShardId, row: int) -> Field:
        """Read one field of a sample. Raises BrokenError, after it was noted, if it cannot be read or does not fit."""
        value = self.cache.field(column, shard, row)
        try:
            return self.checked(column, value)
        except BrokenError as error:
            self.cache.note(column, shard, row, str(error))
            raise

    def checked(self, column: str, value: Field | BrokenError) -> Field:
        """Return the same field of a sample; raises BrokenError if it is one, or cannot be trained on."""
        if isinstance(value, BrokenError):
            raise value
        if column == self.leg.latents:
            channels, *sides = self.latent_shape
            expected = (2 * channels if self.moments else channels, *sides)
            if value.shape != expected:
                raise BrokenError(f"its shape in {column} is {value.shape}, the others' is {expected}")
        elif len(value.shape) != 2 or not len(value) or value.shape[1] != self.text_width:
            raise BrokenError(f"its shape in {column} is {value.shape}, expected (tokens, {self.text_width})")
        if not is_finite(value):
            raise BrokenError(f"its numbers in {column} are not all finite")
        return value

    def _refuse_too_many(self) -> None:
        """Raise RequestError once more of this leg's samples are broken than the recipe allows."""
        broken = self.cache.broken
        if len(broken) == self._broken_before:
            return
        self._broken_before = len(broken)
        count, most = broken.count(self.index, (self.leg.latents, *self.text)), self.recipe.max_broken
        if count > most * len(self.index):
            column, _, shard, row, why = broken.listed()[-1]
            raise RequestError(
                f"{count:,} of {len(self.index):,} samples are broken, more than max_broken = {most:g} allows, such as "
                f"column {column}, shard {shard}{'' if row == WHOLE else f', row {row}'}: {why}; "
                "run `microdit verify`, then `microdit build --repair`, or raise max_broken"
            )

    def _micro_batch(
        self, step: int, rows: np.ndarray, latents: list[Field], texts: list[Field], draw: Draw, part: list[int]
    ) -> MicroBatch:
        text, mask = pad_text([texts[i] for i in part], self.recipe.text_lengths, self._buffers)
        stacked = self._buffers((len(part), *latents[part[0]].shape), latents[part[0]].dtype)
        for out, i in zip(stacked.numpy(), part, strict=True):
            out[...] = latents[i]
        drawn = Noise.of(
            self.recipe.seed, step, rows[part], self.latent_shape, self.tokens, self.moments, self._buffers
        )
        if drawn.posterior is not None:
            mean, deviation = stacked.float().chunk(2, dim=1)
            stacked = mean + deviation * drawn.posterior
        return MicroBatch(
            torch.from_numpy(rows[part]), stacked, text, mask, draw.sigma_normal[part], drawn.noise, drawn.permutation
        )
