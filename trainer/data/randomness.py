"""The random numbers of a batch: everything random about row i of step s is a function of (seed, s, i)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microdit.pipeline.base.buffers import Buffers
from microdit.pipeline.selection.sample_index import splitmix


@dataclass(frozen=True)
class Draw:
    """The small random numbers of some rows of a global batch: those that say what is read. (n,) each."""

    sigma_normal: Tensor
    caption: np.ndarray
    dropout: np.ndarray

    @classmethod
    def of(cls, seed: int, step: int, batch: int, rows: np.ndarray) -> "Draw":
        """Draw for all `batch` rows by one generator, so that no process's depend on the others."""
        generator = torch.Generator().manual_seed(_seed(seed, 3, step))
        normal = torch.randn(batch, generator=generator)
        caption, dropout = (torch.rand(batch, generator=generator).numpy() for _ in range(2))
        return cls(normal[torch.from_numpy(rows)], caption[rows], dropout[rows])


@dataclass(frozen=True)
class Noise:
    """The large ones: each row has a generator of its own, so that a process draws its own rows alone."""

    noise: Tensor
    permutation: Tensor | None
    posterior: Tensor | None = None

    @classmethod
    def of(
        cls,
        seed: int,
        step: int,
        rows: np.ndarray,
        latent_shape: Sequence[int],
        tokens: int | None,
        moments: bool = False,
        buffer: Buffers | None = None,
    ) -> "Noise":
        """Draw for some rows. tokens: length of the permutations, None without masking. moments: draw latents too."""
        new, shape, single = buffer or Buffers(), (len(rows), *latent_shape), np.dtype(np.float32)
        noise, posterior = new(shape, single), new(shape, single) if moments else None
        order = None if tokens is None else torch.empty(len(rows), tokens)
        generator = torch.Generator()
        for i, row in enumerate(_row_seeds(seed, step, rows).tolist()):
            generator.manual_seed(row)
            noise[i].normal_(generator=generator)
            if order is not None:
                order[i].uniform_(generator=generator)
            if posterior is not None:  # the last one, so that the others are the same for every kind of latents
                posterior[i].normal_(generator=generator)
        return cls(noise, None if order is None else order.argsort(dim=1), posterior)


@dataclass(frozen=True)
class HeldOutDraw:
    """Random draws of a held-out sample other than its noise level; `column` counts in `LegData.text`."""

    column: int
    noise: Tensor
    posterior: Tensor

    @classmethod
    def of(cls, sample: int, text_bounds: np.ndarray, latent_shape: Sequence[int]) -> "HeldOutDraw":
        """Draw for one sample. sample: its hash. text_bounds: cumulative shares of the text columns."""
        generator = torch.Generator().manual_seed(_seed(sample, 6))
        caption = torch.rand(1, generator=generator).item()
        return cls(
            min(int(np.searchsorted(text_bounds, caption, side="right")), len(text_bounds) - 1),
            torch.randn(*latent_shape, generator=generator),
            torch.randn(*latent_shape, generator=generator),
        )


def weights_seed(seed: int) -> int:
    """Derive the seed that a recipe's weights begin with: its own up to 32 bits, as torch on a CPU reads no more."""
    return seed if seed < 2**32 else _seed(seed, 7)


def _seed(*words: int) -> int:
    """Derive the seed of a generator, 63 bits."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _row_seeds(seed: int, step: int, rows: np.ndarray) -> np.ndarray:
    """Derive the seeds of the rows' generators, 63 bits each."""
    return splitmix(rows.astype(np.uint64), np.uint64(_seed(seed, 3, step))) >> np.uint64(1)
