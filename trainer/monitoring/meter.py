"""Meter of the steps: speed and losses between two lines of the log, and gradients that were not finite."""

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microdit.model.device import peak_memory_mb
from microdit.model.flops import gpu_peak
from microdit.pipeline.base.json_lines import JsonLines
from microdit.pipeline.selection.sample_index import SampleIndex
from microdit.trainer.data.batch import Batch
from microdit.trainer.monitoring.log import Log, by_noise
from microdit.trainer.monitoring.progress import Progress
from microdit.trainer.objective import NOISE_BINS, Step
from microdit.trainer.processes import Team

LIMIT = 3  # steps in a row whose gradient is not finite, and the run stops


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
        """Give the same batches; the time until each is there counts as waited."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def pause(self, seconds: float) -> None:
        """Take out time that went by beside the training, which does not count as slow."""
        self.marked += seconds

    def add(self, step: Step) -> None:
        """Count a step; one that is not finite counts as skipped."""
        sums = torch.cat([step.loss.reshape(1), step.noise.flatten()])
        self.sums += torch.where(step.bad > 0, 0.0, sums)
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
        """Write a line of the log."""
        self.settle()
        progress, seconds = self.progress, time.perf_counter() - self.marked
        self.speed = speed = (progress.seen - self.marked_seen) / seconds
        progress.loss = progress.loss_sum / progress.loss_steps if progress.loss_steps else None
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
        loss = "nothing learned" if progress.loss is None else f"loss {progress.loss:.4f}"
        validation = "" if progress.validation is None else f"  validation {progress.validation:.4f}"
        self.log.status(
            f"stage {stage + 1}/{len(progress.lengths)}  step {progress.step}/{sum(progress.lengths)}  "
            f"{loss}{validation}  {speed:,.0f} images/s  {minutes}:{rest:02d} left"
            + (f"  {progress.skipped} steps skipped" if progress.skipped else ""),
            last=images_left == 0,
        )
        self.sums.zero_()
        self.loss_steps.zero_()
        self.marked, self.marked_seen, self.waited, self.flops = time.perf_counter(), progress.seen, 0.0, 0


class NotFinite:
    """Notes steps whose gradient was not finite; only `settle` waits for the device, else they are known later.

    before: the `Progress.position` before the first of those `in_a_row`. Each process writes the samples of its part of
    a bad batch as a line of OUT/not-finite-RANK.jsonl.
    """

    def __init__(self, out: Path, team: Team):
        self.path, self.device = out / f"not-finite-{team.rank}.jsonl", team.device
        self._lines = JsonLines(self.path)
        self.in_a_row, self.before = 0, dict[str, Any]()
        self._pending: deque[tuple[dict[str, Any], Tensor, Any, SampleIndex, np.ndarray]] = deque()

    def add(self, before: dict[str, Any], bad: Tensor, index: SampleIndex, positions: np.ndarray) -> None:
        """Note a step. bad: 1 if its gradient was not finite, else 0; positions: of its samples in the index."""
        event = None
        if self.device.type == "cuda":
            bad, event = bad.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self._pending.append((before, bad, event, index, positions))
        self.settle(wait=False)

    def settle(self, wait: bool = True) -> None:
        """Take in all steps that are known, or wait for all."""
        while self._pending and (wait or self._pending[0][2] is None or self._pending[0][2].query()):
            before, bad, event, index, positions = self._pending.popleft()
            if event is not None:
                event.synchronize()
            if bad.item():
                self.before = before if self.in_a_row == 0 else self.before
                samples = [index.name(i) for i in positions.tolist()]
                self._lines.append({"step": before["step"] + 1, "samples": samples})
            self.in_a_row = self.in_a_row + 1 if bad.item() else 0
