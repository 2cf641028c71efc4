"""Decode latents of a column by the autoencoder that they were made with."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from microdit.model.device import best_device
from microdit.pipeline.corpus.records import Declaration

BATCH_LATENTS = 4096  # positions (h x w) of the latents that are decoded at a time: 16 images of 128 px, 1 of 512 px


def decode_latents(declaration: Declaration, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Decode latents (c, h, w) of one column to uint8 images (8h, 8w, 3).

    Raises:
        ValueError: the autoencoder that is here is not the one that the column was made with.
    """
    import torch  # slow to import, and not needed by a corpus without latents

    model = declaration.made_by.get("model", {})
    autoencoder = _autoencoder(str(declaration.made_by["autoencoder"]), model.get("revision"))
    if any(autoencoder.fingerprint.get(name) != value for name, value in model.items()):
        raise ValueError(f"the autoencoder {autoencoder.name!r} that is here is not the one that made them")
    decoded: list[np.ndarray] = []
    at_once = max(1, BATCH_LATENTS // latents[0][0].size)
    while len(decoded) < len(latents):
        stacked = torch.from_numpy(np.stack(latents[len(decoded) : len(decoded) + at_once]))
        if declaration.made_by.get("posterior") == "moments":
            stacked = stacked[:, : autoencoder.channels]  # the means
        decoded += list(autoencoder.decode(stacked).numpy())
    return decoded


@lru_cache(maxsize=1)
def _autoencoder(name: str, revision: str | None) -> Any:
    from microdit.model.pretrained.autoencoder import load_autoencoder

    return load_autoencoder(name, revision=revision, device=best_device())
