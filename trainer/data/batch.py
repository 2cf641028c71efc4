"""Batches on a device: padding of ragged text, and memory that is used again."""

import math
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.quantised import Field, Quantised

MOST_FREE = 12  # buffers that wait for a batch
LARGER = 2  # times as large as asked for may a buffer be that is given again


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes, b samples: see `EDM.loss`."""

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


class Buffers:
    """Tensors to fill, whose memory comes back when the last one that shares it is gone. For any thread.

    Fresh memory costs more than what is written into it: a page fault for each 4 KB.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=MOST_FREE)  # whose methods are atomic: no lock

    def __call__(self, shape: Sequence[int], dtype: np.dtype) -> Tensor:
        """Give an uninitialised tensor; where there is a GPU it is pinned, so that it goes there without a stop."""
        if torch.cuda.is_available():  # torch keeps pinned memory by itself
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            return torch.empty(tuple(shape), dtype=kind, pin_memory=True)
        size = math.prod(shape) * dtype.itemsize
        memory = self._taken(size)
        part = memory[:size].view(dtype).reshape(shape)
        weakref.finalize(part, self._free.append, memory).atexit = False  # a tensor keeps the array that it was made of
        return torch.from_numpy(part)

    def _taken(self, size: int) -> np.ndarray:
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:  # another thread was faster
                break
            if size <= len(memory) <= LARGER * size:
                return memory
            self._free.append(memory)
        return np.empty(size, np.uint8)


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
