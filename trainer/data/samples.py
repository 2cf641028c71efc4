"""The samples of a recipe, made once for all processes of a machine, and what they are read through."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from microdit.pipeline.corpus.cache_room import CacheRoom
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.disk_cache import DiskCache
from microdit.pipeline.selection.broken_samples import NotingShardCache
from microdit.pipeline.selection.mapped_arrays import private_folder
from microdit.pipeline.selection.run_samples import AskedSamples, RunSamples, map_samples, prepare_samples
from microdit.trainer.processes import Team
from microdit.trainer.recipe import Recipe

FOLDER = "microdit-index"
T = TypeVar("T")


def open_samples(recipe: Recipe, team: Team | None = None) -> RunSamples:
    """Open the samples of a recipe, the first process before the others.

    Raises:
        RequestError: corpus, selection or column is missing, stale or empty; or `cache_mb` or `cache_gb` is too small.
    """
    folder = private_folder(FOLDER) if recipe.cache_folder is None else recipe.cache_folder / FOLDER
    legs = [(leg.latents, leg.selection or recipe.selection) for leg in recipe.stages]
    asked = AskedSamples(legs, list(recipe.text), recipe.hold_out, recipe.seed, recipe.mix)
    world = 1 if team is None else team.world

    def check(sizes: Mapping[str, Sequence[int]]) -> None:
        if corpus.store.root is None:
            disk = None if recipe.cache_folder is None else int(recipe.cache_gb * 1e9)
            own = max(recipe.lanes // world, 1)
            local_room(own, recipe.shuffle_window, world, recipe.cache_mb << 20, disk).spread(sizes, recipe.lanes)

    def first(work: Callable[[], T]) -> T:
        return work() if team is None else team.from_first(work)

    corpus = Corpus.open(recipe.corpus)
    key, named = first(lambda: prepare_samples(corpus, asked, folder, check))
    return map_samples(corpus, key, named, folder)


def local_room(lanes: int, window: int, world: int, memory: int, disk: int | None) -> CacheRoom:
    """Describe the room for what a process with so many lanes, one of `world`, reads at a time."""
    return CacheRoom(lanes, window, int(os.environ.get("LOCAL_WORLD_SIZE", world)), memory, disk)


def open_cache(recipe: Recipe, samples: RunSamples) -> NotingShardCache:
    """Open what a run reads its shards through."""
    disk = None if recipe.cache_folder is None else DiskCache(recipe.cache_folder, int(recipe.cache_gb * 1e9))
    return NotingShardCache(samples.corpus, samples.columns, recipe.cache_mb << 20, disk)
