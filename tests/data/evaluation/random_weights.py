"""Make the same random weights of Inception everywhere: by its names and shapes alone, with numpy."""

import zlib
from collections.abc import Mapping

import numpy as np
import torch


def random_weights(like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fill a state dictionary, so that activations neither vanish nor grow through the network."""
    filled = {}
    for name, value in like.items():
        random = np.random.default_rng(zlib.crc32(name.encode()))
        numbers = random.standard_normal(tuple(value.shape))
        if name.endswith("conv.weight"):
            numbers *= (2 / np.prod(value.shape[1:])) ** 0.5
        elif name.endswith("bn.weight"):
            numbers = 1 + 0.1 * numbers
        elif name.endswith("running_var"):
            numbers = 1 + 0.1 * abs(numbers)
        elif name.endswith("num_batches_tracked"):
            numbers = np.zeros(())
        else:
            numbers *= 0.1
        filled[name] = torch.from_numpy(np.asarray(numbers)).to(value.dtype)
    return filled
