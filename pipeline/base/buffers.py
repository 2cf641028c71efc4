"""Memory for tensors that is used again."""

import math
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MOST_FREE = 12  # buffers that wait to be asked for
LARGER = 2  # times as large as asked for may a buffer be that is given again


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
