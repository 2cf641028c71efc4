"""What stages with a model share: what identifies its numbers, and how batches go through it."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from microdit.pipeline.base.liveness import alive

GPU_THREADS = 8  # that decode beside a GPU at least: those that it does not need sleep
T = TypeVar("T")
R = TypeVar("R")


class Mark:
    """A moment of a device's work: a CPU's when this is made, a GPU's when it has done what it was given until then."""

    def __init__(self, device: Any):
        import torch

        self._time, self._event = time.monotonic(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Until that moment.

        Raises:
            torch.AcceleratorError: the GPU's work went wrong.
        """
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Mark") -> float:
        """How long after another one this was; both must be over."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return float(earlier._event.elapsed_time(self._event)) / 1000


# -- batches -----------------------------------------------------------------------------------------------------------
class Batches:
    """Sends samples through a model in batches of `size`, which is halved for good when the GPU's memory runs out."""

    def __init__(self, size: int):
        self.size = size
        self.seconds = 0.0
        """Time of the model since it was loaded."""

    def run(self, encode: Callable[[Sequence[T], int], Sequence[R]], samples: Sequence[T]) -> list[R | Exception]:
        """What `encode(some samples, batch size)` gives for each sample, or the error that a sample alone causes.

        Raises:
            Exception: one sample alone needs too much memory, the GPU is broken, or a batch has no sample that works.
        """
        import torch

        found: list[R | Exception] = []
        while len(found) < len(samples):
            batch = samples[len(found) : len(found) + self.size]
            alive()
            began = time.monotonic()
            try:
                found += encode(batch, self.size)
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size = (self.size + 1) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            except torch.AcceleratorError:  # nothing works in this process any more
                raise
            except Exception as error:
                alone = [self._alone(encode, sample) for sample in batch]
                if len(batch) > 1 and all(isinstance(result, Exception) for result in alone):
                    raise error  # it is not the samples
                found += alone
            finally:
                self.seconds += time.monotonic() - began
        return found

    def _alone(self, encode: Callable[[Sequence[T], int], Sequence[R]], sample: T) -> R | Exception:
        import torch

        try:
            return encode([sample], self.size)[0]
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            return error
