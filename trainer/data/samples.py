"""The samples of a run: which each leg trains on, and which no leg does."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.disk_cache import DiskCache
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.shard_cache import ShardId
from microdit.pipeline.selection.broken_samples import NotingShardCache
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.selection.sample_index import SampleIndex, index_samples
from microdit.trainer.recipe import Recipe


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
    columns = newest_commits(corpus, list(dict.fromkeys([*(leg.latents for leg in recipe.stages), *recipe.text])))
    wanted = [(leg.latents, leg.selection or recipe.selection) for leg in recipe.stages]
    indexes = {
        (latents, selection): index_samples(
            corpus, {name: columns[name] for name in (latents, *recipe.text)}, selection
        )
        for latents, selection in dict.fromkeys(wanted)
    }
    legs, held = split([indexes[one][0] for one in wanted], recipe.hold_out, recipe.seed)
    return RunSamples(corpus, columns, [index.mixed(recipe.mix) for index in legs], held, indexes[wanted[-1]][1])


def open_cache(recipe: Recipe, samples: RunSamples) -> NotingShardCache:
    """Open what a run reads its shards through."""
    disk = None if recipe.cache_folder is None else DiskCache(recipe.cache_folder, int(recipe.cache_gb * 1e9))
    return NotingShardCache(samples.corpus, samples.columns, recipe.cache_mb << 20, disk)
