"""TensorBoard's files, which a full disk does not spoil. Imports torch and tensorboard."""

import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes numbers and pictures. Numbers for which the disk has no room wait in memory and come with later ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._waiting: list[tuple[int, dict[str, float]]] = []
        self._purge: int | None = None  # from this step on older numbers are not shown, until TensorBoard knows
        self._writer: SummaryWriter | None = None

    def begin(self, step: int) -> None:
        """Go on after `step`: numbers of later steps, written before a kill, are not shown."""
        self._purge = step + 1
        threading.excepthook = _quiet_excepthook

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Take numbers, by name, that the next `write` writes."""
        self._waiting.append((step, numbers))

    def write(self) -> OSError | None:
        """Write the numbers that wait. Returns why not, or None."""
        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self.folder), purge_step=self._purge)
            for step, numbers in self._waiting:
                for key, number in numbers.items():
                    self._writer.add_scalar(key, number, step)
            self._writer.flush()  # here, so that its thread never meets a full disk
        except OSError as error:
            self.close()  # it writes no more; the next one has a file of its own
            return error
        self._waiting, self._purge = [], None
        return None

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Write a picture, if there is room."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        writer, self._writer = self._writer, None
        with suppress(OSError):
            if writer is not None:
                writer.close()


def _quiet_excepthook(thrown: threading.ExceptHookArgs) -> None:
    """Print what ends a thread, but for a full disk's error in TensorBoard's, which the next number raises again."""
    if type(thrown.thread) is not _AsyncWriterThread or not isinstance(thrown.exc_value, OSError):
        threading.__excepthook__(thrown)
