"""The samples of a run: which each leg trains on, which no leg does, and which turned out broken."""

import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.disk_cache import DiskCache
from microdit.pipeline.corpus.open_shard import BrokenError, Field
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.shard_cache import ShardCache, ShardId
from microdit.pipeline.selection.sample_index import SampleIndex, index_samples, open_columns
from microdit.trainer.recipe import Recipe

WHOLE = -1  # in place of a row


def split(indexes: Sequence[SampleIndex], hold_out: int, seed: int) -> tuple[list[SampleIndex], list[SampleIndex]]:
    """Split off what is held out of all legs: the `hold_out` lowest hashes of the last one.

    Returns what each leg trains on and, for each leg, those held out that it could have trained on: all of them for the
    last leg.

    Raises:
        RequestError: nothing would be left to train on.
    """
    last = indexes[-1]
    hashes = last.hashes(seed)[last.lowest(hold_out, seed)]
    left, held = [], []
    for index in indexes:
        own = index.hashes(seed)
        apart = own <= hashes.max() if hold_out else np.zeros(len(index), dtype=bool)
        left.append(index.take(~apart) if hold_out else index)
        apart[apart] = np.isin(own[apart], hashes)
        held.append(index.take(apart))
        if not len(left[-1]):
            raise RequestError(f"hold_out: {hold_out} leaves nothing to train on of {len(last)} samples; lower it")
    return left, held


@dataclass(frozen=True)
class RunSamples:
    """The samples of a run: `legs[i]` is what leg i trains on, `held` what no leg does.

    `held_by_leg[i]`: those of `held` that leg i's latents column and selection have.
    """

    corpus: Corpus
    columns: dict[str, dict[ShardId, Commit]]
    legs: list[SampleIndex]
    held_by_leg: list[SampleIndex]
    missing: int
    """Samples of the selection that are not ok in every column of the last leg."""

    @property
    def held(self) -> SampleIndex:
        return self.held_by_leg[-1]


def open_samples(recipe: Recipe) -> RunSamples:
    """Open the samples of a recipe. Raises RequestError if corpus, selection or column is missing, stale or empty."""
    corpus = Corpus.open(recipe.corpus)
    columns = open_columns(corpus, list(dict.fromkeys([*(leg.latents for leg in recipe.stages), *recipe.text])))
    wanted = [(leg.latents, leg.selection or recipe.selection) for leg in recipe.stages]
    indexes = {
        (latents, selection): index_samples(
            corpus, {name: columns[name] for name in (latents, *recipe.text)}, selection
        )
        for latents, selection in dict.fromkeys(wanted)
    }
    legs, held = split([indexes[one][0] for one in wanted], recipe.hold_out, recipe.seed)
    return RunSamples(corpus, columns, [index.mixed(recipe.mix) for index in legs], held, indexes[wanted[-1]][1])


# -- which are broken ------------------------------------------------------------------------------------------------
class BrokenSamples:
    """What of which column is broken: (column, source, shard, row or `WHOLE`) -> why."""

    def __init__(self) -> None:
        self._reasons: dict[tuple[str, str, str, int], str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def why(self, column: str, shard: ShardId, row: int = WHOLE) -> str | None:
        if not self._reasons:
            return None
        return self._reasons.get((column, *shard, WHOLE)) or self._reasons.get((column, *shard, row))

    def add(self, column: str, shard: ShardId, row: int, why: str) -> None:
        """Note something, and print it once."""
        with self._lock:
            if self.why(column, shard, row) is None:
                self._reasons[column, *shard, row] = why
                what = f"column {column}, shard {shard[1]}" + ("" if row == WHOLE else f", row {row}")
                print(f"broken, and replaced: {what}: {why}", file=sys.stderr, flush=True)

    def listed(self) -> list[list[Any]]:
        """List all for a checkpoint: [column, source, shard, row, why], sorted."""
        with self._lock:
            return sorted([*key, why] for key, why in self._reasons.items())

    def restore(self, listed: Iterable[Iterable[Any]]) -> None:
        """Add what another process, or an earlier run, has found: it stays replaced even if it was mended since."""
        with self._lock:
            for column, source, shard, row, why in listed:
                self._reasons.setdefault((column, source, shard, row), why)

    def count(self, index: SampleIndex, columns: Iterable[str]) -> int:
        """Count the samples of an index that are broken in one of these columns."""
        numbers = {shard: number for number, shard in enumerate(index.shards)}
        wanted, hit = set(columns), np.zeros(len(index), dtype=bool)
        for column, source, shard, row, _ in self.listed():
            number = numbers.get((source, shard))
            if column in wanted and number is not None:
                own = slice(*np.searchsorted(index.shard, [number, number + 1]))
                hit[own] |= True if row == WHOLE else index.row[own] == row
        return int(hit.sum())


class NotingShardCache(ShardCache):
    """A cache of shards that notes in `broken` what cannot be read."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.broken = BrokenSamples()

    def field(self, column: str, shard: ShardId, row: int) -> Field:
        """Read what a row of a column holds.

        Raises:
            BrokenError: it cannot be read.
            RequestError: the storage fails.
        """
        if why := self.broken.why(column, shard, row):
            raise BrokenError(why)
        try:
            return super().field(column, shard, row)
        except BrokenError as error:
            opened = self.request(column, shard).exception() is None
            self.broken.add(column, shard, row if opened else WHOLE, str(error))
            raise


def open_cache(recipe: Recipe, samples: RunSamples) -> NotingShardCache:
    """Open what a run reads its shards through."""
    disk = None if recipe.cache_folder is None else DiskCache(recipe.cache_folder, int(recipe.cache_gb * 1e9))
    return NotingShardCache(samples.corpus, samples.columns, recipe.cache_mb << 20, disk)
