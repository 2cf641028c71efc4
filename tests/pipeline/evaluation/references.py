"""What the public tools said of the pictures and features in `tests/data/evaluation`."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from microdit.model.pretrained.inception import Inception, inception_of

DATA = Path(__file__).parents[2] / "data" / "evaluation"


def references() -> dict[str, np.ndarray]:
    """Read what `make_references.py` wrote."""
    with np.load(DATA / "references.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def random_inception() -> Inception:
    """Build the network with the weights that the tools had."""
    spec = importlib.util.spec_from_file_location("random_weights", DATA / "random_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights: dict[str, torch.Tensor] = module.random_weights(Inception().state_dict())
    return inception_of(weights)
