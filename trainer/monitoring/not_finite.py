"""Steps whose gradient was not finite: which samples were in them, and how many there were in a row."""

import json
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microdit.pipeline.selection.sample_index import SampleIndex
from microdit.trainer.processes import Team

LIMIT = 3  # in a row, and the run stops


class NotFinite:
    """Looks at what the device has told so far, and never waits for it: a step is known to be bad some steps later.

    Each process writes the samples of its part of a bad batch as a line of OUT/not-finite-RANK.jsonl.
    """

    def __init__(self, out: Path, team: Team):
        self.path, self.device = out / f"not-finite-{team.rank}.jsonl", team.device
        self.in_a_row = 0
        self._pending: deque[tuple[int, Tensor, Any, SampleIndex, np.ndarray]] = deque()

    def add(self, step: int, bad: Tensor, index: SampleIndex, positions: np.ndarray) -> None:
        """bad: 1 if the gradient of this step was not finite, else 0; positions: of its samples in the index."""
        event = None
        if self.device.type == "cuda":
            bad, event = bad.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self._pending.append((step, bad, event, index, positions))
        while self._pending and (self._pending[0][2] is None or self._pending[0][2].query()):
            step, bad, _, index, positions = self._pending.popleft()
            self.in_a_row = self.in_a_row + 1 if bad.item() else 0
            if bad.item():
                self._write(step, [index.name(i) for i in positions.tolist()])

    def _write(self, step: int, samples: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "samples": samples}) + "\n")
