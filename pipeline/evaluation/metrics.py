"""The metrics of `microdit evaluate`, by name: what features each takes, and how many pictures it needs.

Each value has a standard error of the pictures that were drawn, not of the network's training: by resampling for the
Fréchet distances, from disjoint tenths of the sets for KID and CMMD, and from the spread over pictures for the others.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.distances import (
    KID_SUBSET,
    KID_SUBSETS,
    gaussian_mmd,
    kernel_distance,
    neighbourhoods,
    polynomial_mmd,
)
from microdit.pipeline.evaluation.feature_sets import FeatureSet, frechet_of_sets
from microdit.pipeline.evaluation.features import CLIP_B32, CLIP_L14, DINOV2, INCEPTION, LITE0

RESAMPLES, TENTHS, NEAREST = 10, 10, 5
Figures = dict[str, float | int | None]
"""`value`, `error`, and what else a metric tells."""


@dataclass(frozen=True)
class Metric:
    """A distance between two sets of pictures."""

    features: str
    compute: Callable[[FeatureSet, FeatureSet], Figures]
    least: int
    """Pictures of each set that it needs."""
    of_statistics: bool = False
    """A reference's mean and covariance are enough."""


def frechet(pictures: FeatureSet, reference: FeatureSet) -> Figures:
    """Compute the Fréchet distance, and its standard error by resampling both sets, with replacement."""
    random = np.random.default_rng(0)
    drawn = [frechet_of_sets(pictures.drawn(random), reference.drawn(random)) for _ in range(RESAMPLES)]
    return {"value": frechet_of_sets(pictures, reference), "error": float(np.std(drawn, ddof=1))}


def kid(pictures: FeatureSet, reference: FeatureSet) -> Figures:
    """Compute KID over 100 subsets of 1,000 pictures, or of all if a set has fewer."""
    first, second = _both(pictures, reference)
    size = min(KID_SUBSET, len(first), len(second))
    subsets = KID_SUBSETS if size < max(len(first), len(second)) else 1
    value = kernel_distance(first, second, subsets, size)
    return {"value": value, "error": _of_tenths(polynomial_mmd, first, second), "subset": size, "subsets": subsets}


def cmmd(pictures: FeatureSet, reference: FeatureSet) -> Figures:
    """Compute CMMD."""
    first, second = _both(pictures, reference)
    return {"value": gaussian_mmd(first, second), "error": _of_tenths(gaussian_mmd, first, second)}


def prdc(pictures: FeatureSet, reference: FeatureSet) -> Figures:
    """Compute precision, recall, density and coverage with 5 neighbours; `value` is the F1 of the first two."""
    first, second = _both(pictures, reference)
    found = neighbourhoods(first, second, NEAREST)
    total = found.precision + found.recall
    value = 2 * found.precision * found.recall / total if total else 0.0
    errors = {
        f"{name}_error": float((share * (1 - share) / count) ** 0.5)
        for name, share, count in (
            ("precision", found.precision, len(first)),
            ("recall", found.recall, len(second)),
            ("coverage", found.coverage, len(second)),
        )
    }
    return {"value": value, "error": None, **asdict(found), **errors, "nearest": NEAREST}


def _both(pictures: FeatureSet, reference: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    assert pictures.features is not None and reference.features is not None
    return pictures.features, reference.features


def _of_tenths(distance: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray) -> float:
    """Estimate the standard error of an average over all pictures from disjoint tenths of both sets."""
    random = np.random.default_rng(0)
    parts = zip(
        np.array_split(random.permutation(len(a)), TENTHS),
        np.array_split(random.permutation(len(b)), TENTHS),
        strict=True,
    )
    values = [distance(a[first], b[second]) for first, second in parts]
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


METRICS = {
    "fid": Metric(INCEPTION, frechet, 2, of_statistics=True),
    "kid": Metric(INCEPTION, kid, 2 * TENTHS),
    "prdc": Metric(INCEPTION, prdc, NEAREST + 1),
    "clip-fid": Metric(CLIP_B32, frechet, 2, of_statistics=True),
    "fd-dinov2": Metric(DINOV2, frechet, 2, of_statistics=True),
    "cmmd": Metric(CLIP_L14, cmmd, 2 * TENTHS),
    "fid-lite": Metric(LITE0, frechet, 2, of_statistics=True),
    "kid-lite": Metric(LITE0, kid, 2 * TENTHS),
}


def check_counts(name: str, pictures: int, reference: int | None) -> None:
    """Refuse sets that are too small for a metric; `reference` is None of a statistics file.

    Raises:
        RequestError: they are.
    """
    metric = METRICS[name]
    if reference is None and not metric.of_statistics:
        also = ", ".join(each for each, other in METRICS.items() if other.of_statistics)
        raise RequestError(
            f"metric {name!r}: it needs the reference's pictures, and a statistics file holds their mean and "
            f"covariance alone; give a folder, or one of {also}"
        )
    for what, count in (("pictures", pictures), ("pictures of the reference", reference)):
        if count is not None and count < metric.least:
            raise RequestError(f"metric {name!r}: {count} {what}; it takes at least {metric.least}")
