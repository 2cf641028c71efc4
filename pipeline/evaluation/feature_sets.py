"""Features of a set of pictures, or what is known of them; the Fréchet distance of two such sets."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from microdit.pipeline.evaluation.distances import frechet_distance
from microdit.pipeline.evaluation.statistics import FeatureStatistics


@dataclass(frozen=True)
class FeatureSet:
    """Features (N, D) of pictures, or, of a file, their mean and covariance alone."""

    features: np.ndarray | None = None
    name: str = ""
    """The identity of the extractor."""
    known: FeatureStatistics | None = None

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Mean and covariance."""
        if self.known is not None:
            return self.known
        assert self.features is not None
        return FeatureStatistics.of(self.features, self.name)

    @cached_property
    def scaled(self) -> np.ndarray | None:
        """The features X (N, D), centred and scaled so that X'X is the covariance, where N is at most D; else None."""
        if self.features is None or len(self.features) > self.features.shape[1]:
            return None
        centred = self.features.astype(np.float64) - self.mean
        return centred / (len(centred) - 1) ** 0.5

    @cached_property
    def mean(self) -> np.ndarray:
        """The mean (D,), float64."""
        return self.statistics.mean if self.features is None else self.features.mean(0, dtype=np.float64)

    def drawn(self, random: np.random.Generator) -> "FeatureSet":
        """Draw as many pictures with replacement; mean and covariance alone stay as they are."""
        if self.features is None:
            return self
        return FeatureSet(self.features[random.integers(0, len(self.features), len(self.features))], self.name)


def frechet_of_sets(first: FeatureSet, second: FeatureSet) -> float:
    """Compute the Fréchet distance; with fewer pictures than features by small matrices, and without rounding zeros.

    With A = X'X and B = Y'Y the eigenvalues of AB other than 0 are those of XBX', and the squares of the singular
    values of XY'.
    """
    x, y = first.scaled, second.scaled
    if x is None and y is None:
        one, other = first.statistics, second.statistics
        return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
    if x is not None and y is not None:
        trace, root = (x**2).sum() + (y**2).sum(), np.linalg.svd(x @ y.T, compute_uv=False).sum()
    else:
        small, covariance = (x, second.statistics.covariance) if x is not None else (y, first.statistics.covariance)
        assert small is not None
        values = np.linalg.eigvalsh(small @ covariance @ small.T)
        trace, root = (small**2).sum() + np.trace(covariance), np.sqrt(np.clip(values, 0, None)).sum()
    return float(((first.mean - second.mean) ** 2).sum() + trace - 2 * root)
