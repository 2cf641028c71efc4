"""Where a run is, and what it tells: log.jsonl, TensorBoard, and one line on the terminal."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipeline.errors import RequestError
from trainer.data import Batch
from trainer.recipe import StageRecipe
from trainer.team import Team

PLAIN_STATUS_SECONDS = 10.0  # without a terminal the status line is printed this often


class Log:
    """Writes only where `active` (the first process). Every number of a `line` goes to TensorBoard too."""

    def __init__(self, out: Path, active: bool):
        self.path, self.active = out / "log.jsonl", active
        self._writer: SummaryWriter | None = None
        self._terminal = sys.stdout.isatty()
        self._told = -PLAIN_STATUS_SECONDS

    def open(self, step: int) -> None:
        """Begin, or go on after `step`: lines of later steps, written before a kill, are dropped."""
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [text for text in _lines(self.path) if json.loads(text)["step"] <= step]
        self.path.write_text("".join(f"{text}\n" for text in kept))
        self._writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)

    def line(self, step: int, **values: Any) -> None:
        if self._writer is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def status(self, text: str, last: bool = False) -> None:
        """Replace the status line; `last`: it stays."""
        now = time.monotonic()
        if not self.active or not (self._terminal or last or now - self._told >= PLAIN_STATUS_SECONDS):
            return
        self._told = now
        print(
            f"\r\x1b[2K{text}" if self._terminal else text, end="" if self._terminal and not last else "\n", flush=True
        )

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.active:
            print(f"\r\x1b[2K{text}" if self._terminal else text, flush=True)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; a kill may have cut the last one."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


@dataclass
class Progress:
    """What a checkpoint holds beside tensors."""

    lengths: list[int]  # steps of each stage
    scale: float = 1.0  # what the time budget left of the recipe's lengths
    stage: int = 0
    stage_step: int = 0  # steps done in it
    step: int = 0
    seen: int = 0  # images
    skipped: int = 0  # steps whose gradient was not finite
    seconds: float = 0.0
    loss_sum: float = 0.0  # over the steps since the last line of the log
    loss_steps: int = 0
    loss: float | None = None  # of the last line

    def images(self, stages: Sequence[StageRecipe]) -> int:
        """How many the whole run sees."""
        return sum(length * stage.batch for length, stage in zip(self.lengths, stages, strict=True))


class Meter:
    """Loss, speed and waiting of the steps since the last line of the log; no synchronisation until it is asked."""

    def __init__(self, progress: Progress, team: Team, log: Log):
        self.progress, self.team, self.log = progress, team, log
        self.loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=team.device)
        self.loss_steps = torch.tensor(progress.loss_steps, device=team.device)
        self.skipped = torch.tensor(progress.skipped, device=team.device)
        self.in_a_row = torch.zeros((), device=team.device)
        self.norm = torch.zeros((), device=team.device)
        self.settled = self.marked = time.perf_counter()
        self.marked_seen, self.waited = progress.seen, 0.0
        self.speed = 0.0  # images a second, up to the last line

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there counts as waited."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        self.loss_sum += torch.where(bad > 0, 0.0, loss)
        self.loss_steps += (bad == 0).long()
        self.skipped += bad.long()
        self.in_a_row = (self.in_a_row + bad) * bad
        self.norm = norm

    def settle(self) -> None:
        """Bring `progress` up to date."""
        now = time.perf_counter()
        self.progress.seconds += now - self.settled
        self.settled = now
        self.progress.loss_sum = self.team.mean(self.loss_sum.item())
        self.loss_sum.fill_(self.progress.loss_sum)
        self.progress.loss_steps, self.progress.skipped = int(self.loss_steps), int(self.skipped)

    def write(self, stage: int, rate: float, images_left: int) -> None:
        """A line of the log.

        Raises:
            RequestError: the gradients of the last steps, three at least, were all not finite.
        """
        self.settle()
        progress, seconds = self.progress, time.perf_counter() - self.marked
        if self.in_a_row >= 3:
            raise RequestError(
                f"step {progress.step}: the last {int(self.in_a_row)} gradients were not finite and nothing was "
                "learned; lower the learning rate, or look at the latents. The last checkpoint is from before that"
            )
        self.speed = speed = (progress.seen - self.marked_seen) / seconds
        progress.loss = progress.loss_sum / max(progress.loss_steps, 1)
        self.log.line(
            progress.step, images=progress.seen, stage=stage + 1, loss=progress.loss, learning_rate=rate,
            grad_norm=self.norm.item(), images_per_second=round(speed, 2), data_wait=round(self.waited / seconds, 4),
            skipped=progress.skipped, seconds=round(progress.seconds, 3),
        )  # fmt: skip
        minutes, rest = divmod(round(images_left / speed), 60)
        self.log.status(
            f"stage {stage + 1}/{len(progress.lengths)}  step {progress.step}/{sum(progress.lengths)}  "
            f"loss {progress.loss:.4f}  {speed:,.0f} images/s  {minutes}:{rest:02d} left"
            + (f"  {progress.skipped} steps skipped" if progress.skipped else ""),
            last=images_left == 0,
        )
        self.loss_sum.zero_()
        self.loss_steps.zero_()
        self.marked, self.marked_seen, self.waited = time.perf_counter(), progress.seen, 0.0
