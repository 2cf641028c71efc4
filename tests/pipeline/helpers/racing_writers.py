"""What the processes of race tests do; a module of its own, so that they start without a test framework."""

import os
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.storage.store import open_store
from tests.pipeline.helpers.small_corpus import SOURCE, write_images


def create_all(url: str, racer: int, names: int, barrier: Barrier, wins: "Queue[tuple[int, int]]") -> None:
    """Try to create every name, at the same moment as the others; say which ones were won."""
    store = open_store(url)
    for number in range(names):
        barrier.wait(120)
        try:
            store.create(f"raced/{number}", f"{racer}".encode() * 1000)
        except FileExistsError:
            continue
        wins.put((number, racer))


def write_for_ever(url: str) -> None:
    """Objects of 1 MB come and go, until somebody ends this."""
    store, number = open_store(url), 0
    while True:
        number += 1
        store.create(f"written/{os.getpid()}-{number}", b"0123456789" * 100_000)
        store.delete([f"written/{os.getpid()}-{number - 5}"])


def build_all(url: str, shards: int, barrier: Barrier, done: "Queue[tuple[int, str, str]]") -> None:
    """Write two generations of every shard, at the same moment as the others; say which attempts won."""
    corpus, unit = Corpus.open(url), unit_name(SOURCE, 0)
    for number in range(shards):
        ref = ShardRef(source=SOURCE, unit=unit, shard=shard_name(unit, number))
        barrier.wait(120)
        done.put((number, write_images(corpus, ref).attempt, write_images(corpus, ref, generation=1).attempt))
