"""Send batches through a model on a device, and time it."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from microdit.pipeline.base.liveness import alive

T = TypeVar("T")
R = TypeVar("R")


class DeviceEvent:
    """A moment of a device's work: on a CPU, now; on a GPU, when it has done everything queued until now."""

    def __init__(self, device: Any):
        import torch

        self._time, self._event = time.monotonic(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Wait until the device has come there.

        Raises:
            torch.AcceleratorError: the GPU's work went wrong.
        """
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "DeviceEvent") -> float:
        """Return the seconds between two moments, both of which are over."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return float(earlier._event.elapsed_time(self._event)) / 1000


class Batches:
    """Send samples through a model in batches of `size`, which is halved for good when the GPU's memory runs out."""

    def __init__(self, size: int):
        self.size = size
        self.seconds = 0.0
        """Seconds in the model since it was loaded."""

    def run(self, encode: Callable[[Sequence[T], int], Sequence[R]], samples: Sequence[T]) -> list[R | Exception]:
        """Encode each sample: what `encode(batch, batch size)` returns, or the error that the sample causes alone.

        Raises:
            Exception: one sample alone needs too much memory, the GPU is broken, or every sample of a batch fails.
        """
        import torch

        results: list[R | Exception] = []
        while len(results) < len(samples):
            batch = samples[len(results) : len(results) + self.size]
            alive()
            began = time.monotonic()
            try:
                results += encode(batch, self.size)
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
                results += alone
            finally:
                self.seconds += time.monotonic() - began
        return results

    def _alone(self, encode: Callable[[Sequence[T], int], Sequence[R]], sample: T) -> R | Exception:
        import torch

        try:
            return encode([sample], self.size)[0]
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:
            return error
