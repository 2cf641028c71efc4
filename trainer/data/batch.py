"""Batches on a device, and padding of ragged text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from microdit.pipeline.base.buffers import Buffers
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.quantised import Field, Quantised


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass, b samples: see `EDM.loss`."""

    rows: Tensor  # int64 (b,), of the global batch
    latents: Tensor  # (b, C, H, W)
    text: Tensor  # (b, L, width), zeros behind the text and for dropped captions
    text_mask: Tensor  # bool (b, L)
    sigma_normal: Tensor  # (b,), standard normal
    noise: Tensor  # (b, C, H, W), standard normal
    permutation: Tensor | None  # int64 (b, T)

    def to(self, device: torch.device) -> "MicroBatch":
        def moved(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

        return replace(self, **{name: moved(x) for name, x in vars(self).items() if x is not None})


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch: `positions` in the index, and the same samples in micro-batches.

    Where a sample is broken, `positions` has the one that replaces it.
    """

    positions: np.ndarray
    micro_batches: list[MicroBatch]


def pad_text(texts: Sequence[Field], lengths: Sequence[int], buffer: Buffers | None = None) -> tuple[Tensor, Tensor]:
    """Pad embeddings (tokens, width) to (b, L, width) with zeros behind; also gives bool (b, L), True where text is.

    Raises:
        RequestError: a text is longer than the last of `lengths`.
    """
    longest = max(len(text) for text in texts)
    if longest > lengths[-1]:
        raise RequestError(
            f"text_lengths: a caption has {longest} tokens, the last length is {lengths[-1]}; add {longest}"
        )
    length = next(size for size in lengths if size >= longest)
    padded = (buffer or Buffers())((len(texts), length, texts[0].shape[1]), texts[0].dtype)
    for out, text in zip(padded.numpy(), texts, strict=True):
        if isinstance(text, Quantised):
            text.write(out[: len(text)])
        else:
            out[: len(text)] = text
        out[len(text) :].view(np.uint8).fill(0)  # numpy fills float16 number by number
    return padded, torch.arange(length) < torch.tensor([len(text) for text in texts])[:, None]
