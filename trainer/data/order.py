"""Order of the samples: a pure function of (seed, samples, batch size), for any number of processes.

Shards in a seeded order, their rows concatenated and cut into C lanes of equal size. Row i of a global batch belongs to
lane i mod C, and the n-th sample of a lane is a function of (seed, lane, n) alone. A process owns whole lanes.

An epoch, the next N rows of the global batches, has each sample once. Where C does not divide N, every epoch is cut
into lanes again, because other lanes have a row more in it. Runs that an earlier version began go on with lanes that
are cut once (`even` is False): each has epochs of its own, and where one is shorter its samples come more often.

With weights the lanes are of equal weight: a sample on the border of two belongs to both, with a part of its weight in
each. In an epoch of a lane, as long as N / C, a sample of r times the mean weight comes floor(r) times or once more.
"""

import numpy as np

from microdit.pipeline.selection.sample_index import SampleIndex


def _raw(n: int, *seed: int) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n)


def _shuffled(n: int, *seed: int) -> np.ndarray:
    """Permute range(n) by raw bits and a stable sort, because numpy may change `permutation` but not these."""
    return np.argsort(_raw(n, *seed), kind="stable")


class Lanes:
    """The order of the samples of an index.

    lanes: requested number; with fewer samples, the largest divisor of it that leaves no lane empty.
    window: shards of a lane among which rows are shuffled.
    even: whether every sample comes equally often, see above.
    """

    def __init__(self, index: SampleIndex, lanes: int, seed: int, window: int, even: bool = True):
        self.index, self.seed, self.window, self.even = index, seed, window, even
        self.count = max(d for d in range(1, lanes + 1) if lanes % d == 0 and d <= len(index))
        bounds = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))
        order = _shuffled(len(index.shards), seed, 0)
        self._first = bounds[order]  # sample of each shard, in their order
        self._before = np.concatenate([[0], np.cumsum(np.diff(bounds)[order])])  # samples before each
        self._ends = None
        if index.weight is not None:
            self._ends = np.cumsum(index.weight[self._ordered(0, len(index))], dtype=np.float64)
        self._rows = len(index)  # of an epoch
        if self._ends is not None:
            self._rows = self.count * max(round(len(index) / self.count), 1)
        self._epochs: dict[int, dict[int, tuple[int, np.ndarray]]] = {}  # by lane, then by number

    def size(self, lane: int, epoch: int = 0) -> int:
        """Count the samples in an epoch of a lane."""
        return self._start(lane, epoch + 1) - self._start(lane, epoch)

    def _start(self, lane: int, epoch: int) -> int:
        """Count the samples of a lane before an epoch."""
        return self._below(lane + 1, epoch) - self._below(lane, epoch)

    def _below(self, lane: int, epoch: int) -> int:
        """Count the samples of all lanes below one, before an epoch."""
        if not self.even:
            return epoch * (self._rows * lane // self.count)
        rounds, rest = divmod(epoch * self._rows, self.count)
        return rounds * lane + min(rest, lane)

    def _find(self, lane: int, n: int) -> tuple[int, int]:
        """Return the epoch of a lane's n-th sample, and its number in it."""
        epoch = (n * self.count + lane) // self._rows if self.even else n // self.size(lane)
        return epoch, n - self._start(lane, epoch)

    def _ordered(self, start: int, end: int) -> np.ndarray:
        """Return the samples from `start` to `end` of all, shard by shard in the order of the shards."""
        low, high = np.searchsorted(self._before, start, "right") - 1, np.searchsorted(self._before, end, "left")
        shards = zip(self._before[low:high], self._before[low + 1 : high + 1], self._first[low:high], strict=True)
        return np.concatenate(
            [np.arange(max(start, before), min(end, after)) + (first - before) for before, after, first in shards]
        )

    def samples(self, lane: int, start: int, count: int) -> np.ndarray:
        """Return the positions in the index of samples start, start + 1, ... of a lane, without end."""
        parts = []
        while count > 0:
            epoch, offset = self._find(lane, start)
            part = self._epoch(lane, epoch)[1][offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def window_size(self, lane: int, n: int) -> float:
        """Compute the mean number of samples in the windows of the epoch of a lane's n-th sample."""
        epoch, _ = self._find(lane, n)
        return self.size(lane, epoch) / self._epoch(lane, epoch)[0]

    def replacement(self, seen: int, row: int, tries: int) -> int:
        """Choose what replaces a row of the batch after `seen` samples, `tries - 1` others having been broken too.

        It stands a window further on in its lane, which is read soon anyway, so that a broken shard's samples find
        other ones. Where the lane has no other, the lanes after it are tried.
        """
        lane = row % self.count
        epoch, offset = self._find(lane, seen // self.count + row // self.count)
        if self.even:
            further, tries = divmod(tries, self.size(lane, epoch))
            lane = (lane + further) % self.count
        windows, order = self._epoch(lane, epoch)
        size = len(order)
        return int(order[(offset + tries * (size // windows) + tries // windows) % size])  # after a round, the next one

    def _epoch(self, lane: int, epoch: int) -> tuple[int, np.ndarray]:
        """Return how many windows an epoch of a lane has, and its samples in order."""
        known = self._epochs.setdefault(lane, {})
        if epoch not in known:
            own = self._drawn(lane, epoch)
            pieces = np.split(own, np.flatnonzero(np.diff(self.index.shard[own])) + 1)
            order = _shuffled(len(pieces), self.seed, 1, lane, epoch)
            windows = []
            for number, first in enumerate(range(0, len(pieces), self.window)):
                rows = np.concatenate([pieces[p] for p in order[first : first + self.window]])
                windows.append(rows[_shuffled(len(rows), self.seed, 2, lane, epoch, number)])
            for old in sorted(known)[:-1]:  # where one ends and the next is asked for ahead, both are there
                del known[old]
            known[epoch] = len(windows), np.concatenate(windows)
        return known[epoch]

    def _drawn(self, lane: int, epoch: int) -> np.ndarray:
        """Draw the samples of an epoch of a lane, shard by shard, as often as they come."""
        if self._ends is None:
            first, end = (self._below(border, epoch + 1) - self._below(border, epoch) for border in (lane, lane + 1))
            return self._ordered(first, end)
        low, high = (self._ends[-1] * border / self.count for border in (lane, lane + 1))
        first = int(np.searchsorted(self._ends, low, side="right"))
        last = min(int(np.searchsorted(self._ends, high, side="left")), len(self._ends) - 1)
        parts = np.diff(np.concatenate([[low], self._ends[first:last], [high]]))
        # systematic sampling: marks at every whole number along the samples' weights, in an order of this epoch
        order, size = _shuffled(len(parts), self.seed, 4, lane, epoch), self.size(lane)
        ends = np.cumsum(parts[order])
        ends *= size / ends[-1]
        ends[-1] = size
        start = float(_raw(1, self.seed, 5, lane, epoch)[0] >> np.uint64(44)) / 2**20
        times = np.empty(len(parts), dtype=np.int64)
        times[order] = np.diff(np.floor(ends + start), prepend=0)
        return np.repeat(self._ordered(first, last + 1), times)

    def batch(self, seen: int, batch: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return a rank's part of the global batch after `seen` samples: (rows in it, positions in the index)."""
        each, own = batch // self.count, self.count // world
        lanes = np.arange(rank * own, (rank + 1) * own)
        positions = np.stack([self.samples(lane, seen // self.count, each) for lane in lanes.tolist()], axis=1)
        return (np.arange(each)[:, None] * self.count + lanes).ravel(), positions.ravel()
