"""Collect decoded images into batches for an autoencoder."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from microdit.pipeline.base.threads import chunks
from microdit.pipeline.corpus.rows import Row


class Room:
    """Where a batch is made ready, and from where a GPU copies it: pinned memory.

    `pixels` uint8 (B, side, side, 3) by side, `noise` of the posteriors, float32 (B, c, h, w), by column. The first
    `count` rows of them are samples; those behind are black, and have no noise.
    """

    def __init__(self, size: int, sides: Iterable[int], noise: Mapping[str, tuple[int, ...]], pinned: bool):
        import torch

        self.count = 0
        self.pixels = {s: torch.empty(size, s, s, 3, dtype=torch.uint8, pin_memory=pinned) for s in sides}
        self.noise = {column: torch.empty(size, *shape, pin_memory=pinned) for column, shape in noise.items()}

    def close_ranks(self, places: Sequence[int]) -> None:
        """Move the samples that are at `places` to the front, in order; what is behind them is blanked."""
        self.count = len(places)
        for whole in (*self.pixels.values(), *self.noise.values()):
            for to, place in enumerate(places):
                if to != place:
                    whole[to] = whole[place]
            whole[len(places) :] = 0


@dataclass(frozen=True)
class Sample:
    """An image that is ready for the models: row `place` of a room."""

    row: Row
    room: Room
    place: int


class Shared:
    """What the shards share that a process has in hand at once; a pickle leaves it behind.

    `feeding`: one reads and decodes, until the last of its rows are on their way. `encoding`: one has the models.
    """

    def __init__(self) -> None:
        self.feeding, self.encoding = Lock(), Lock()
        self._rooms: dict[frozenset[str], deque[Room]] = {}

    def __reduce__(self) -> tuple[type["Shared"], tuple[()]]:
        return Shared, ()

    def rooms(self, columns: Iterable[str]) -> deque[Room]:
        """Those that are free of batches for some columns, which are those that most shards are made for."""
        if (asked := frozenset(columns)) not in self._rooms:
            self._rooms = {asked: deque()}
        return self._rooms[asked]


def batched(prepared: Iterable[tuple[Room, list[Sample]]], groups: int, free: deque[Room]) -> Iterator[list[Sample]]:
    """The samples of one room after the other, as soon as all of its groups are there."""
    for batch in chunks(prepared, groups):
        room, there = batch[0][0], [sample for _, some in batch for sample in some]
        room.close_ranks([sample.place for sample in there])
        if there:
            yield [replace(sample, place=place) for place, sample in enumerate(there)]
        else:
            free.append(room)


def rows_of_batch(whole: Any, batch: Sequence[Sample], size: int, pinned: bool) -> Any:
    """The rows of a batch, and zeros behind them up to `size`: without a copy, if they lie so already."""
    import torch

    first, count = batch[0].place, len(batch)
    if first + size <= len(whole) and (count == size or first + count == batch[0].room.count):
        return whole[first : first + size]
    rows = torch.zeros(size, *whole.shape[1:], dtype=whole.dtype, pin_memory=pinned)
    rows[:count] = whole[first : first + count]
    return rows
