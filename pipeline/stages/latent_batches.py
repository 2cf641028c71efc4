"""Stage decoded images in buffers, batch by batch, for an autoencoder."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from microdit.pipeline.base.threads import chunks
from microdit.pipeline.corpus.rows import Row


class StagingBuffer:
    """Pinned-memory staging buffer for one batch.

    `pixels` uint8 (B, side, side, 3) by side, `noise` of the posteriors, float32 (B, c, h, w), by column. The first
    `count` of the B are samples; the rest is black, without noise.
    """

    def __init__(self, size: int, sides: Iterable[int], noise: Mapping[str, tuple[int, ...]], pinned: bool):
        import torch

        self.count = 0
        self.pixels = {s: torch.empty(size, s, s, 3, dtype=torch.uint8, pin_memory=pinned) for s in sides}
        self.noise = {column: torch.empty(size, *shape, pin_memory=pinned) for column, shape in noise.items()}

    def compact(self, indices: Sequence[int]) -> None:
        """Move the samples at `indices` to the front, in order, and zero everything behind them."""
        self.count = len(indices)
        for tensor in (*self.pixels.values(), *self.noise.values()):
            for to, index in enumerate(indices):
                if to != index:
                    tensor[to] = tensor[index]
            tensor[len(indices) :] = 0


@dataclass(frozen=True)
class StagedImage:
    """A sample whose pixels and noise are at `index` of a buffer."""

    row: Row
    buffer: StagingBuffer
    index: int


class ConcurrentShards:
    """State shared by the shards that a process works on at the same time; a pickle leaves it behind.

    `feeding` is held by the shard that reads and decodes, until the last of its rows are on their way; `encoding` by
    the one that uses the models.
    """

    def __init__(self) -> None:
        self.feeding, self.encoding = Lock(), Lock()
        self._free: dict[frozenset[str], deque[StagingBuffer]] = {}

    def __reduce__(self) -> tuple[type["ConcurrentShards"], tuple[()]]:
        return ConcurrentShards, ()

    def free_buffers(self, columns: Iterable[str]) -> deque[StagingBuffer]:
        """Return the buffers to use again for batches of some columns. Other columns drop those of before."""
        if (asked := frozenset(columns)) not in self._free:
            self._free = {asked: deque()}
        return self._free[asked]


def staged_batches(
    prepared: Iterable[tuple[StagingBuffer, list[StagedImage]]], groups: int, free: deque[StagingBuffer]
) -> Iterator[list[StagedImage]]:
    """Yield the samples of one buffer after the other, once all of its groups are ready; free an empty one."""
    for batch in chunks(prepared, groups):
        buffer, staged = batch[0][0], [image for _, group in batch for image in group]
        buffer.compact([image.index for image in staged])
        if staged:
            yield [replace(image, index=index) for index, image in enumerate(staged)]
        else:
            free.append(buffer)


def rows_of_batch(tensor: Any, batch: Sequence[StagedImage], size: int, pinned: bool) -> Any:
    """Return the rows of a buffer's tensor that a batch takes, zero-padded to `size`; a view where it can be one."""
    import torch

    first, count = batch[0].index, len(batch)
    if first + size <= len(tensor) and (count == size or first + count == batch[0].buffer.count):
        return tensor[first : first + size]
    rows = torch.zeros(size, *tensor.shape[1:], dtype=tensor.dtype, pin_memory=pinned)
    rows[:count] = tensor[first : first + count]
    return rows
