"""Measure pictures in memory against a fixed reference: what a run in training and the demo do again and again."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.feature_sets import FeatureSet
from microdit.pipeline.evaluation.features import load_extractor
from microdit.pipeline.evaluation.metrics import METRICS


class ArrayMeter:
    """Holds the networks of some metrics, and the features of the reference by name."""

    def __init__(
        self,
        metrics: Sequence[str],
        reference: Sequence[np.ndarray],
        models: Mapping[str, str] | None = None,
        device: str | torch.device = "cpu",
    ):
        """Load the networks, and extract the features of the reference, uint8 (H, W, 3).

        Raises:
            RequestError: weights cannot be had.
        """
        self.metrics = list(metrics)
        names = dict.fromkeys(METRICS[name].features for name in metrics)
        models = models or {}
        self._extractors = {name: load_extractor(name, model=models.get(name), device=device) for name in names}
        self.reference = self.features(reference)

    def features(self, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Extract the features (N, D) of pictures, by name; of none (0, 0)."""
        return {
            name: np.concatenate([np.zeros((0, 0), np.float32)] if not len(pictures) else list(each.extract(pictures)))
            for name, each in self._extractors.items()
        }

    def measure(self, pictures: Sequence[np.ndarray]) -> dict[str, Any]:
        """Measure pictures, uint8 (H, W, 3): `value` and `error` by metric."""
        return self.compare(self.features(pictures))

    def compare(self, features: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Measure pictures by their features.

        Raises:
            RequestError: they are not finite.
        """
        if not all(np.isfinite(each).all() for each in features.values()):
            raise RequestError("the features of the pictures are not all finite")
        sets = {name: (FeatureSet(features[name]), FeatureSet(self.reference[name])) for name in features}
        return {name: METRICS[name].compute(*sets[METRICS[name].features]) for name in self.metrics}


def interleaved(parts: Sequence[Mapping[str, np.ndarray]], count: int) -> dict[str, np.ndarray]:
    """Join features that several processes extracted of every n-th picture each, in the order of the pictures."""
    joined = {}
    for name in parts[0]:
        own = [part[name] for part in parts if len(part[name])]
        joined[name] = np.empty((count, own[0].shape[1]), np.float32)
        for rank, features in enumerate(own):
            joined[name][rank :: len(parts)] = features
    return joined
