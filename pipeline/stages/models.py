"""What stages with a model share: what identifies its numbers, and how batches go through it."""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import RequestError
from pipeline.watch import alive

T = TypeVar("T")
R = TypeVar("R")

# -- identity: told from a model's files; no weights are loaded, the hub is asked for a config only --------------------


@lru_cache(maxsize=16)
def autoencoder_identity(column: str, name: str, revision: str | None) -> dict[str, Any]:
    """Repository and commit, or a folder's name and hash, of an autoencoder that `column` asks for; dtype, normaliser.

    Raises:
        RequestError: there is no such model, or its files cannot be had.
    """
    from model.autoencoder import autoencoder_fingerprint

    return _identity(f"columns.{column}.autoencoder = {name!r}", autoencoder_fingerprint, name, revision)


@lru_cache(maxsize=16)
def text_encoder_identity(column: str, name: str, revision: str | None, trim: bool = False) -> dict[str, Any]:
    """The same for a text encoder; and how many tokens it keeps."""
    from model.text import text_encoder_fingerprint

    return _identity(f"columns.{column}.encoder = {name!r}", text_encoder_fingerprint, name, revision, trim=trim)


@lru_cache(maxsize=16)
def captioner_identity(column: str, name: str, revision: str | None) -> dict[str, Any]:
    """The same for a captioner; and its family."""
    from model.captioners import captioner_fingerprint

    return _identity(f"columns.{column}.vlm = {name!r}", captioner_fingerprint, name, revision)


@lru_cache(maxsize=16)
def tagger_identity(column: str, name: str) -> dict[str, Any]:
    """Name and hash of a tagger."""
    from model.tagger import tagger_fingerprint

    try:
        return tagger_fingerprint(name)
    except ValueError as error:
        raise RequestError(f"columns.{column}.tags = {name!r}: {error}") from error


@lru_cache(maxsize=16)
def vision_identity(column: str, task: Any, name: str, label: str | None, revision: str | None) -> dict[str, Any]:
    """The same for a model that scores pictures."""
    from model.vision import vision_fingerprint

    field = f"columns.{column}.model = {name!r}"
    return _identity(field, vision_fingerprint, name, revision, task=task, label=label)


def carried_identity(column: str, name: str) -> dict[str, Any]:
    """The same for a model that a package carries (`model.carried`)."""
    from model.carried import carried
    from model.hub import ModelFilesError

    try:
        return carried(name)
    except ModelFilesError as error:
        raise RequestError(f"columns.{column}: {error}") from error


def _identity(
    field: str, fingerprint: Callable[..., Any], name: str, revision: str | None, **options: Any
) -> dict[str, Any]:
    from model.hub import ModelFilesError

    try:
        return fingerprint(name, revision=revision, **options)
    except (ModelFilesError, ValueError) as error:
        raise RequestError(f"{field}: {error}") from error


def absolute(name: str) -> str:
    """A folder's name as any process can open it; another name as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def best_device() -> str:
    """`cuda` if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


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
