"""Keep the best sample of each neighbourhood: what is dropped is near what is kept, not only linked to it by others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

PART = 1 << 20  # pairs that are compared at a time
Near = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Compares pairs of samples, given as two arrays of indices (or one index and an array); returns which are near."""


@dataclass(frozen=True)
class KeptGroups:
    """Samples grouped by the one that is kept of each group."""

    keeper: np.ndarray
    """(n,) int64: for each sample the index of the one that is kept; its own if it is kept."""

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n,) int64: how many samples share each sample's keeper."""
        return np.bincount(self.keeper, minlength=len(self.keeper))[self.keeper]

    @cached_property
    def members(self) -> np.ndarray:
        """(m,) int64: the samples in groups of two or more, in order."""
        return np.flatnonzero(self.sizes > 1)

    @cached_property
    def kept(self) -> np.ndarray:
        """(m,) int64: the keeper of each member."""
        return self.keeper[self.members]

    @property
    def count(self) -> int:
        """Count the groups of two or more samples."""
        return int((self.kept == self.members).sum())

    @property
    def largest(self) -> int:
        """Samples of the largest group."""
        return int(self.sizes.max(initial=0))


def nearest_kept(labels: np.ndarray, area: np.ndarray, near: Near) -> KeptGroups:
    """Choose the sample that is kept for each sample: the largest one, as it came, and then the first, that is near it.

    Samples that are linked by steps are gone through from the largest to the smallest: each is kept unless it is near
    one that is kept already. So no two of a linked group that are kept are near each other.

    Args:
        labels: (n,) equal for samples that are linked by steps of near pairs.
        area: (n,) pixels of each picture.
    """
    order = np.lexsort((-area, labels))  # stable: of equal areas the first
    changes = np.flatnonzero(np.diff(labels[order])) + 1
    starts, ends = np.append(0, changes)[: len(order)], np.append(changes, len(order))[: len(order)]
    heads = np.repeat(order[starts], ends - starts)
    keeper = np.arange(len(order))
    parts = [slice(at, at + PART) for at in range(0, len(order), PART)]
    close = np.zeros(len(order), bool)
    for part in parts:  # the first round of all groups at once: most groups end with it
        close[part] = near(order[part], heads[part])
    keeper[order[close]] = heads[close]
    left = ~close & (order != heads)
    more = ends - starts > 2
    for start, end in zip(starts[more].tolist(), ends[more].tolist(), strict=True):
        rest = order[start:end][left[start:end]]
        while len(rest) > 1:
            close = near(rest[0], rest[1:])
            keeper[rest[1:][close]] = rest[0]
            rest = rest[1:][~close]
    return KeptGroups(keeper)
