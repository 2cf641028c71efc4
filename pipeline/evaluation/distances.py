"""Compute how far two sets of features are from each other: FID, KID, CMMD, precision and recall.

Everything is computed in float64 from float32 features (N, D), block by block, so that 50,000 features of 2,048 numbers
need no matrix of 50,000 by 50,000.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 4096  # rows of features whose distances to all others are in memory at a time
KID_SUBSETS, KID_SUBSET, KID_SEED = 100, 1000, 2020  # as torch-fidelity draws them
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """Compute the Fréchet distance of two normal distributions (Heusel et al., arXiv 1706.08500).

    `|m - n|^2 + tr(A) + tr(B) - 2 tr((AB)^(1/2))`. The last trace is the sum of the square roots of the eigenvalues of
    `A^(1/2) B A^(1/2)`, which is symmetric: they are real, and negative ones are rounding. Of few samples many are 0.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ other_covariance @ root)
    trace = np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(np.clip(product, 0, None)).sum()
    return float(((mean - other_mean) ** 2).sum() + trace)


def kernel_distance(
    features: np.ndarray, other: np.ndarray, subsets: int = KID_SUBSETS, size: int = KID_SUBSET, seed: int = KID_SEED
) -> float:
    """Compute KID (Bińkowski et al., arXiv 1801.01401): the mean over random subsets of the unbiased squared MMD.

    The kernel is `(x.y / D + 1)^3`. Subsets are drawn as torch-fidelity draws them.
    """
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        some = features[random.choice(len(features), size, replace=False)]
        values.append(polynomial_mmd(some, other[random.choice(len(other), size, replace=False)]))
    return float(np.mean(values))


def polynomial_mmd(features: np.ndarray, other: np.ndarray) -> float:
    """Compute the unbiased squared MMD of two sets by the kernel of KID."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        base = a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1
        return np.asarray(base * base * base)  # a tenth of the time of a power

    def within(a: np.ndarray) -> float:
        values = kernel(a, a)
        return float((values.sum() - np.trace(values)) / (len(a) * (len(a) - 1)))

    return within(features) + within(other) - 2 * float(kernel(features, other).mean())


def gaussian_mmd(features: np.ndarray, other: np.ndarray) -> float:
    """Compute CMMD (Jayasumana et al., arXiv 2401.09603) of unit features: the squared MMD, biased, times 1,000."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        total = sum(np.exp(-squares / (2 * CMMD_SIGMA**2)).sum() for _, squares in square_distances(a, b))
        return float(total / (len(a) * len(b)))

    return CMMD_SCALE * (mean(features, features) + mean(other, other) - 2 * mean(features, other))


def square_distances(features: np.ndarray, other: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Compute squared Euclidean distances, (n, M) float64, for `BLOCK` rows of the first set after the other."""
    columns = other.astype(np.float64)
    norms = (columns**2).sum(1)
    for start in range(0, len(features), BLOCK):
        rows = features[start : start + BLOCK].astype(np.float64)
        squares = (rows**2).sum(1)[:, None] + norms - 2 * rows @ columns.T
        yield slice(start, start + len(rows)), np.clip(squares, 0, None)


@dataclass(frozen=True)
class Neighbourhoods:
    """Hold the figures of `neighbourhoods`: means over the pictures, each of 0 to 1 but for `density`."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(features: np.ndarray, reference: np.ndarray, nearest: int = 5) -> Neighbourhoods:
    """Compute precision and recall (Kynkäänniemi et al.), density and coverage (Naeem et al., arXiv 2002.09797).

    The ball of a sample reaches to its `nearest`-th neighbour within its own set.

        precision  the share of pictures that lie in a ball of the reference
        recall     the share of the reference that lies in a ball of the pictures
        density    in how many balls of the reference a picture lies, by `nearest`
        coverage   the share of the reference's balls in which a picture lies
    """
    own, real = _radii(features, nearest), _radii(reference, nearest)
    inside = np.zeros(len(features), np.int64)  # of how many balls of the reference
    recalled, covered = np.zeros(len(reference), bool), np.zeros(len(reference), bool)
    for rows, squares in square_distances(features, reference):
        inside[rows] = (squares < real).sum(1)
        covered |= (squares < real).any(0)
        recalled |= (squares < own[rows, None]).any(0)
    return Neighbourhoods(
        precision=float((inside > 0).mean()),
        recall=float(recalled.mean()),
        density=float(inside.mean() / nearest),
        coverage=float(covered.mean()),
    )


def _radii(features: np.ndarray, nearest: int) -> np.ndarray:
    """Find the squared distance of each sample to its `nearest`-th neighbour, itself not counted."""
    radii = np.empty(len(features))
    for rows, squares in square_distances(features, features):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = 0  # not a rounding error above others
        radii[rows] = np.partition(squares, nearest, axis=1)[:, nearest]
    return radii
