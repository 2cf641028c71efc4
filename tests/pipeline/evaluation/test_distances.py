"""Distances of features, against the tools that people use, and against plain formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.evaluation import distances
from microdit.pipeline.evaluation.distances import (
    frechet_distance,
    gaussian_mmd,
    kernel_distance,
    neighbourhoods,
    polynomial_mmd,
)
from microdit.pipeline.evaluation.feature_sets import FeatureSet, frechet_of_sets
from microdit.pipeline.evaluation.statistics import FeatureStatistics
from tests.pipeline.evaluation.references import references


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    a, b = FeatureStatistics.of(first), FeatureStatistics.of(second)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@pytest.mark.parametrize("tool", ["torch_fidelity", "pytorch_fid", "clean_fid"])
def test_fid_is_that_of_the_tools(tool: str) -> None:
    known = references()
    # torch-fidelity takes the mean in float32
    assert frechet(known["first"], known["second"]) == pytest.approx(float(known[f"fid_{tool}"]), rel=1e-6)


def test_kid_is_that_of_the_tools() -> None:
    known = references()
    first, second = known["first"], known["second"]
    assert kernel_distance(first, second) == pytest.approx(float(known["kid_torch_fidelity"]), rel=1e-6)
    one = polynomial_mmd(first[:1000], second[:1000])
    assert one == pytest.approx(float(known["kid_clean_fid"]), rel=1e-6)


@pytest.mark.parametrize("block", [64, distances.BLOCK])
def test_precision_recall_density_and_coverage_are_those_of_prdc(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    known = references()
    monkeypatch.setattr(distances, "BLOCK", block)
    found = neighbourhoods(known["first"], known["second"])
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name) == pytest.approx(float(known[f"prdc_{name}"]), rel=1e-6), name


def test_cmmd_is_the_formula() -> None:
    random = np.random.default_rng(0)
    first, second = (random.standard_normal((n, 8)) for n in (40, 30))
    first, second = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (first, second))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((x - y) ** 2).sum() / 200) for y in b] for x in a]))

    expected = 1000 * (mean(first, first) + mean(second, second) - 2 * mean(first, second))
    assert gaussian_mmd(first.astype(np.float32), second.astype(np.float32)) == pytest.approx(expected, rel=1e-4)


@given(st.integers(3, 40), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_a_set_is_at_no_distance_from_itself(count: int, width: int, seed: int) -> None:
    features = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    spread = FeatureStatistics.of(features)
    assert abs(frechet(features, features)) < 1e-6 * np.trace(spread.covariance) + 1e-9
    assert abs(gaussian_mmd(features, features)) < 1e-9
    found = neighbourhoods(features, features, nearest=2)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


@given(st.integers(0, 2**32 - 1))
def test_fid_of_two_lines_is_known(seed: int) -> None:
    """Of one feature it is `(m - n)^2 + (s - t)^2`."""
    random = np.random.default_rng(seed)
    first, second = (random.standard_normal((50, 1)) * random.uniform(0.5, 3) + random.uniform(-2, 2) for _ in "ab")
    expected = (first.mean() - second.mean()) ** 2 + (first.std(ddof=1) - second.std(ddof=1)) ** 2
    assert frechet(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("counts", [(20, 25), (20, 300), (300, 20)])
def test_fewer_pictures_than_features_give_the_same_by_small_matrices(counts: tuple[int, int]) -> None:
    random = np.random.default_rng(4)
    first, second = (random.standard_normal((n, 60)).astype(np.float32) + i for i, n in enumerate(counts))
    expected = frechet(first, second)
    for other in (FeatureSet(second), FeatureSet(known=FeatureStatistics.of(second))):
        assert frechet_of_sets(FeatureSet(first), other) == pytest.approx(expected, rel=1e-6)
