"""Text embeddings in fewer bits: integers, and a float16 scale for each group of channels of each token.

A scale is the group's largest magnitude over the largest integer, so an outlier channel spoils its own group alone.

    int8   q.npy   int8 (tokens, width), -127..127         groups of at most 128 channels
    int4   q4.npy  uint8 (tokens, width / 2), the even channel in the low four bits, each plus 8; groups of at most 32
    both   scale.npy  float16 (tokens, groups); a group has ceil(width / groups) channels, the last one what is left

Writing is torch's, on the device where the embedding is; reading (`arrays.array_from_bytes`) is numpy's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


Storage = Literal["int8", "int4"]


@dataclass(frozen=True)
class Form:
    """The parameters of a storage."""

    largest: int
    """The largest integer."""
    group: int
    """Channels of a group, at most."""
    loss: float
    """The relative error above which a build stops by default."""


FORMS: dict[Storage, Form] = {"int8": Form(127, 128, 0.03), "int4": Form(7, 32, 0.2)}
TINY = 2.0**-24  # the smallest float16 above 0


def groups_of(width: int, storage: Storage) -> int:
    """Count the scales of a token."""
    return -(-width // FORMS[storage].group)


def quantise(embeddings: "Tensor", storage: Storage) -> dict[str, "Tensor"]:
    """Quantise embeddings, float (..., width), to the arrays of a sample: `q` or `q4`, and `scale`.

    Values beyond float16, and values that are not finite, give a scale that is not finite.

    Raises:
        ValueError: int4 of an odd width.
    """
    import torch

    form, width = FORMS[storage], embeddings.shape[-1]
    if storage == "int4" and width % 2:
        raise ValueError(f"int4 takes an even number of channels, not {width}")
    groups = groups_of(width, storage)
    size = -(-width // groups)
    padded = torch.nn.functional.pad(embeddings.float(), (0, groups * size - width))
    parts = padded.unflatten(-1, (groups, size))
    wanted = parts.abs().amax(-1) / form.largest
    scale = wanted.half()
    # rounded up, so that no integer is beyond the largest; never 0
    scale = torch.where(scale.float() < wanted, (scale.float() * (1 + 2.0**-10) + TINY).half(), scale).clamp(min=TINY)
    scale = torch.where((scale * form.largest).isfinite(), scale, torch.inf)
    q = (parts / scale.float()[..., None]).round().flatten(-2)[..., :width].nan_to_num().to(torch.int8)
    if storage == "int8":
        return {"q": q, "scale": scale}
    low, high = (q + 8).to(torch.uint8).unflatten(-1, (width // 2, 2)).unbind(-1)
    return {"q4": low | high << 4, "scale": scale}


@dataclass(frozen=True)
class Quantised:
    """One sample as it is stored: `q` int8 (tokens, width), `scale` float16 (tokens, groups)."""

    q: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> "Quantised":
        """Unpack the arrays of a sample.

        Raises:
            ValueError: they are not what `quantise` gives.
        """
        scale, packed = arrays.get("scale"), arrays.get("q4")
        if packed is not None and packed.dtype == np.uint8 and packed.ndim == 2:
            pairs = np.stack([packed & 15, packed >> 4], -1).astype(np.int8) - np.int8(8)
            q = pairs.reshape(len(packed), 2 * packed.shape[1])
        else:
            q = arrays.get("q", np.empty(0, np.int8))
        fits = q.ndim == 2 and q.dtype == np.int8
        fits = fits and scale is not None and scale.ndim == 2 and scale.dtype == np.float16
        if not fits or scale is None or len(scale) != len(q) or not 0 < scale.shape[1] <= q.shape[1]:
            given = {name: f"{array.dtype} {array.shape}" for name, array in arrays.items()}
            raise ValueError(
                f"npz: expected q (int8) or q4 (uint8), and scale (float16), of as many tokens; found {given}"
            )
        return cls(q, scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float16)

    def __len__(self) -> int:
        return len(self.q)

    def write(self, out: np.ndarray) -> None:
        """Dequantise into `out`, contiguous float16 (tokens, width)."""
        q, groups = self.q, self.scale.astype(np.float32)
        if q.shape[1] % groups.shape[1] == 0:  # several times as fast
            parts = (*groups.shape, q.shape[1] // groups.shape[1])
            out.reshape(parts)[...] = q.reshape(parts) * groups[..., None]
        else:
            out[...] = q * np.repeat(groups, -(-q.shape[1] // groups.shape[1]), axis=1)[:, : q.shape[1]]


def dequantise(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Dequantise the arrays of one sample to float16 (tokens, width).

    Raises:
        ValueError: they are not what `quantise` gives.
    """
    sample = Quantised.of(arrays)
    numbers = np.empty(sample.shape, sample.dtype)
    sample.write(numbers)
    return numbers


# -- loss --------------------------------------------------------------------------------------------------------------
@dataclass
class Loss:
    """The loss of quantising, measured on some samples token by token."""

    cosines: list[np.ndarray]
    errors: list[np.ndarray]
    """Length of the difference over the length of the token's embedding."""

    @classmethod
    def none(cls) -> "Loss":
        return cls([], [])

    def compare(self, exact: np.ndarray, stored: np.ndarray) -> float:
        """Count one sample, (tokens, width) each; returns its relative error over all tokens."""
        x, y = exact.astype(np.float64), stored.astype(np.float64)
        lengths = np.linalg.norm(x, axis=1).clip(min=np.finfo(np.float32).tiny)
        self.cosines.append((x * y).sum(1) / (lengths * np.linalg.norm(y, axis=1).clip(min=np.finfo(np.float32).tiny)))
        self.errors.append(np.linalg.norm(x - y, axis=1) / lengths)
        return float(np.linalg.norm(x - y) / max(np.linalg.norm(x), np.finfo(np.float32).tiny))

    def figures(self) -> dict[str, float]:
        """Count the samples for a commit, and of their tokens the mean and the worst cosine and relative error."""
        if not sum(map(len, self.cosines)):
            return {}
        cosines, errors = np.concatenate(self.cosines), np.concatenate(self.errors)
        return {
            "compared": len(self.cosines),
            "cosine_mean": float(cosines.mean()),
            "cosine_worst": float(cosines.min()),
            "error_mean": float(errors.mean()),
            "error_worst": float(errors.max()),
        }


def compared(hashes: Sequence[int]) -> set[int]:
    """Return the indices of the one in a hundred (rounded up) with the smallest hashes."""
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    return set(order[: -(-len(hashes) // 100)])


Field: TypeAlias = np.ndarray | Quantised  # what a row of a column of arrays holds
