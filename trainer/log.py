"""Where a run is, and what it tells: log.jsonl, TensorBoard, and one line on the terminal."""

import importlib
import json
import resource
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from model.flops import gpu_peak
from pipeline.errors import RequestError
from trainer.data import Batch
from trainer.learner import NOISE_BINS, NOISE_EDGES, Step
from trainer.recipe import StageRecipe
from trainer.team import Team

NOISE_NAMES = [
    f"{low:g}..{high:g}" for low, high in zip((-float("inf"), *NOISE_EDGES), (*NOISE_EDGES, float("inf")), strict=True)
]
PLAIN_STATUS_SECONDS = 10.0  # without a terminal the status line is printed this often


class Log:
    """Writes only where `active` (the first process). Every number of a `line` goes to TensorBoard too.

    wandb: a project of W&B that gets them as well.

    Raises:
        RequestError: that is not installed, or one cannot log in there and it is not to be offline.
    """

    def __init__(self, out: Path, active: bool, wandb: str | None = None, name: str | None = None):
        self.path, self.active, self.name = out / "log.jsonl", active, name
        self._project, self._run = wandb, None
        self._wandb = _wandb_ready(wandb) if wandb is not None and active else None
        self._writer: SummaryWriter | None = None
        self._terminal = sys.stdout.isatty()
        self._told = -PLAIN_STATUS_SECONDS

    def open(self, step: int, progress: "Progress") -> None:
        """Begin, or go on after `step`: lines of later steps, written before a kill, are dropped.

        Raises:
            RequestError: W&B does not take the run.
        """
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [text for text in _lines(self.path) if json.loads(text)["step"] <= step]
        self.path.write_text("".join(f"{text}\n" for text in kept))
        if self._wandb is not None:
            progress.wandb_run = progress.wandb_run or secrets.token_hex(4)
            names = {"project": self._project, "name": self.name, "id": progress.wandb_run}
            try:
                self._run = self._wandb.init(**names, dir=str(self.path.parent), resume="allow")
            except self._wandb.Error as error:
                raise RequestError(f"wandb = {self._project}: {error}; or set WANDB_MODE=offline") from error
        self._writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)

    def line(self, step: int, **values: Any) -> None:
        """A value may be a dictionary of numbers, or of such; None stands for what is not known."""
        if self._writer is None:
            return
        numbers = _flat(values)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            for key, number in numbers.items():
                self._writer.add_scalar(key, number, step)
        except OSError as error:  # a full disk stops no run; the next line may find room
            self.say(f"step {step}: a line of {self.path} is lost: {error}")
        if self._run is not None:
            self._run.log(numbers, step=step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """A sheet of pictures, to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image("samples", np.asarray(picture), step, dataformats="HWC")
        if self._run is not None and self._wandb is not None:
            self._run.log({"samples": self._wandb.Image(picture)}, step=step)

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
        if self._run is not None:
            self._run.finish()


def _wandb_ready(project: str) -> Any:
    """The module of W&B, with somebody logged in or offline. Raises RequestError."""
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
    """Mean losses by noise, from sums and numbers of samples."""
    return {name: loss / n if n else None for name, loss, n in zip(NOISE_NAMES, sums, counts, strict=True)}


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of nested dictionaries, by names with slashes."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": number for key, number in _flat(value).items()}
        elif value is not None:
            found[name] = value
    return found


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
    noise: list[float] = field(default_factory=lambda: [0.0] * (2 * NOISE_BINS))  # the same by noise, see `Step`
    loss: float | None = None  # of the last line
    validation: float | None = None  # the last one: of the first average, or of the weights if there is none
    wandb_run: str | None = None  # which run of W&B goes on
    looked: int = -1  # the step after which the last validation, or the last sheet of pictures, was due

    def images(self, stages: Sequence[StageRecipe]) -> int:
        """How many the whole run sees."""
        return sum(length * stage.batch for length, stage in zip(self.lengths, stages, strict=True))


class Meter:
    """Loss, speed and waiting of the steps since the last line of the log; no synchronisation until it is asked."""

    def __init__(self, progress: Progress, team: Team, log: Log):
        self.progress, self.team, self.log = progress, team, log
        # the sum of the losses, and the sums by noise
        self.sums = torch.tensor([progress.loss_sum, *progress.noise], dtype=torch.float64, device=team.device)
        self.loss_steps = torch.tensor(progress.loss_steps, device=team.device)
        self.skipped = torch.tensor(progress.skipped, device=team.device)
        self.norm = torch.zeros((), device=team.device)
        self.settled = self.marked = time.perf_counter()
        self.marked_seen, self.waited, self.flops = progress.seen, 0.0, 0
        self.speed = 0.0  # images a second, up to the last line
        self.peak = gpu_peak(torch.cuda.get_device_name()) if team.device.type == "cuda" else None

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there counts as waited."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def pause(self, seconds: float) -> None:
        """So much time went by beside the training, and does not count as slow."""
        self.marked += seconds

    def add(self, step: Step) -> None:
        found = torch.cat([step.loss.reshape(1), step.noise.flatten()])
        self.sums += torch.where(step.bad > 0, 0.0, found)
        self.loss_steps += (step.bad == 0).long()
        self.skipped += step.bad.long()
        self.norm = step.norm
        self.flops += step.flops

    def settle(self) -> None:
        """Bring `progress` up to date."""
        now = time.perf_counter()
        self.progress.seconds += now - self.settled
        self.settled = now
        means = self.team.means(self.sums)
        self.sums.copy_(torch.tensor(means, dtype=torch.float64))
        self.progress.loss_sum, self.progress.noise = means[0], means[1:]
        self.progress.loss_steps, self.progress.skipped = int(self.loss_steps), int(self.skipped)

    def write(self, stage: int, rate: float, images_left: int) -> None:
        """A line of the log."""
        self.settle()
        progress, seconds = self.progress, time.perf_counter() - self.marked
        self.speed = speed = (progress.seen - self.marked_seen) / seconds
        progress.loss = progress.loss_sum / max(progress.loss_steps, 1)
        sums, counts = progress.noise[:NOISE_BINS], progress.noise[NOISE_BINS:]
        self.log.line(
            progress.step, images=progress.seen, stage=stage + 1, loss=progress.loss,
            loss_by_noise=by_noise(sums, counts), learning_rate=rate, grad_norm=self.norm.item(),
            images_per_second=round(speed, 2),
            data_wait=round(self.waited / seconds, 4), mfu=self.peak and round(self.flops / seconds / self.peak, 4),
            peak_memory_mb=peak_memory_mb(self.team.device), skipped=progress.skipped,
            seconds=round(progress.seconds, 3), seconds_left=round(images_left / speed, 1),
        )  # fmt: skip
        minutes, rest = divmod(round(images_left / speed), 60)
        validation = "" if progress.validation is None else f"  validation {progress.validation:.4f}"
        self.log.status(
            f"stage {stage + 1}/{len(progress.lengths)}  step {progress.step}/{sum(progress.lengths)}  "
            f"loss {progress.loss:.4f}{validation}  {speed:,.0f} images/s  {minutes}:{rest:02d} left"
            + (f"  {progress.skipped} steps skipped" if progress.skipped else ""),
            last=images_left == 0,
        )
        self.sums.zero_()
        self.loss_steps.zero_()
        self.marked, self.marked_seen, self.waited, self.flops = time.perf_counter(), progress.seen, 0.0, 0


def peak_memory_mb(device: torch.device) -> int:
    """The most that this process has held so far: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
