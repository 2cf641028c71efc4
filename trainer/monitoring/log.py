"""The log of a run: log.jsonl, TensorBoard, W&B, and one line on the terminal."""

import importlib
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.json_lines import JsonLines, plain
from microdit.pipeline.base.tensorboard import TensorBoard
from microdit.pipeline.base.terminal import printable
from microdit.trainer.monitoring.progress import Progress
from microdit.trainer.objective import NOISE_EDGES

NOISE_NAMES = [
    f"{low:g}..{high:g}" for low, high in zip((-float("inf"), *NOISE_EDGES), (*NOISE_EDGES, float("inf")), strict=True)
]

PLAIN_STATUS_SECONDS = 10.0  # without a terminal the status line is printed this often


class Log:
    """Writes only where `active` (the first process). Every number of a `line` goes to TensorBoard too.

    Where the disk is full, lines and numbers wait in memory until there is room.

    wandb: a project of W&B that gets them as well.

    Raises:
        RequestError: that is not installed, or one cannot log in there and it is not to be offline.
    """

    def __init__(self, out: Path, active: bool, wandb: str | None = None, name: str | None = None):
        self.path, self.active, self.name = out / "log.jsonl", active, name
        self._lines, self._board = JsonLines(self.path), TensorBoard(out / "tensorboard")
        self._full = False
        self._project, self._run = wandb, None
        self._wandb = _wandb_ready(wandb) if wandb is not None and active else None
        self._terminal = sys.stdout.isatty()
        self._clear = "\r\x1b[2K" if self._terminal else ""
        self._printed = -PLAIN_STATUS_SECONDS

    def open(self, step: int, progress: "Progress") -> None:
        """Begin, or go on after `step`: lines of later steps, written before a kill, are dropped.

        Raises:
            RequestError: W&B does not take the run, or the disk is full.
        """
        if not self.active:
            return
        self._board.begin(step)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lines.keep(lambda line: isinstance(line.get("step"), int) and line["step"] <= step)
        except OSError as error:
            raise RequestError(f"{self.path} cannot be written: {error}; make room, or set out elsewhere") from error
        if self._wandb is not None:
            progress.wandb_run = progress.wandb_run or secrets.token_hex(4)
            names = {"project": self._project, "name": self.name, "id": progress.wandb_run}
            try:
                self._run = self._wandb.init(**names, dir=str(self.path.parent), resume="allow")
            except self._wandb.Error as error:
                raise RequestError(f"wandb = {self._project}: {error}; or set WANDB_MODE=offline") from error

    def line(self, step: int, **values: Any) -> None:
        """Write a line. A value may be a dictionary of numbers, or of such; None stands for what is not known."""
        if not self.active:
            return
        numbers = _flat(plain(values))
        self._board.add(step, numbers)
        error = self._lines.append({"step": step} | values) or self._board.write()
        if self._full == (error is None):  # which stops no run
            what = f"waits in memory until there is room: {error}" if error else "is written again"
            self.say(f"step {step}: the log in {self.path.parent} {what}")
        self._full = error is not None
        if self._run is not None:
            with suppress(OSError):  # its own process writes, and goes on
                self._run.log(numbers, step=step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Give a sheet of pictures to TensorBoard and W&B."""
        self._board.picture("samples", picture, step)
        if self._run is not None and self._wandb is not None:
            self._run.log({"samples": self._wandb.Image(picture)}, step=step)

    def status(self, text: str, last: bool = False) -> None:
        """Replace the status line; `last`: it stays."""
        now = time.monotonic()
        if not self.active or not (self._terminal or last or now - self._printed >= PLAIN_STATUS_SECONDS):
            return
        self._printed = now
        print(f"{self._clear}{text}", end="" if self._terminal and not last else "\n", flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self.active:
            print(f"{self._clear}{printable(text)}", flush=True)

    def close(self) -> None:
        if self._full and (error := self._lines.write() or self._board.write()):
            self.say(f"the last lines of {self.path} and of TensorBoard are lost: {error}")
        self._board.close()
        if self._run is not None:
            self._run.finish()


def _wandb_ready(project: str) -> Any:
    """Import W&B, with somebody logged in or offline. Raises RequestError."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise RequestError(f'wandb = {project}: pip install "microdit[wandb]" first ({error})') from error
    try:
        if wandb.setup().settings.mode == "online":
            wandb.login()  # asks, where there is a terminal
    except wandb.Error as error:
        raise RequestError(
            f"wandb = {project}: cannot log in there ({error}); or set WANDB_MODE=offline, and `wandb sync` later"
        ) from error
    return wandb


def by_noise(sums: Sequence[float], counts: Sequence[float]) -> dict[str, float | None]:
    """Compute mean losses by noise from sums and numbers of samples."""
    return {name: loss / n if n else None for name, loss, n in zip(NOISE_NAMES, sums, counts, strict=True)}


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    """Flatten the numbers of nested dictionaries, by names with slashes."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in _flat(value).items()}
        elif value is not None:
            flat[name] = value
    return flat
