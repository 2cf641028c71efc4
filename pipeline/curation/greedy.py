"""Keep the best sample of each neighbourhood: what is dropped is near what is kept, not only linked to it by others."""

from collections.abc import Callable

import numpy as np

Near = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Compares pairs of samples, given as two arrays of indices (or one index and an array); returns which are near."""


def nearest_kept(labels: np.ndarray, area: np.ndarray, near: Near) -> np.ndarray:
    """Choose the sample that is kept for each sample: the largest one, as it came, and then the first, that is near it.

    Samples that are linked by steps are gone through from the largest to the smallest: each is kept unless it is near
    one that is kept already. So no two of a linked group that are kept are near each other.

    Args:
        labels: (n,) equal for samples that are linked by steps of near pairs.
        area: (n,) pixels of each picture.

    Returns:
        (n,) int64, an index for each sample; its own if it is kept.
    """
    order = np.lexsort((-area, labels))  # stable: of equal areas the first
    changes = np.flatnonzero(np.diff(labels[order])) + 1
    starts, ends = np.append(0, changes)[: len(order)], np.append(changes, len(order))[: len(order)]
    heads = np.repeat(order[starts], ends - starts)
    keeper = np.arange(len(order))
    close = near(order, heads)  # the first round of all groups at once: most groups end with it
    keeper[order[close]] = heads[close]
    left = ~close & (order != heads)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        rest = order[start:end][left[start:end]] if end - start > 2 else order[:0]
        while len(rest) > 1:
            close = near(rest[0], rest[1:])
            keeper[rest[1:][close]] = rest[0]
            rest = rest[1:][~close]
    return keeper


def group_sizes(keeper: np.ndarray) -> np.ndarray:
    """Count the samples that share each sample's keeper, (n,) int64."""
    return np.bincount(keeper, minlength=len(keeper))[keeper]
