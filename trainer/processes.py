"""This process among those of a run (torchrun's)."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from microdit.pipeline.base.errors import RequestError, first_line

SECONDS = 2.0  # between the moments when all processes agree on whether a signal came: a stall of each GPU
SAID = "the first process says so"  # a note of errors that need no second message
MOST_STEPS = 64  # between two of them
T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    rank: int
    world: int
    device: torch.device

    def means(self, values: torch.Tensor) -> list[float]:
        """Average float64 (n,) over the processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.SUM)
            values /= self.world
        return values.tolist()

    def gathered(self, value: Any) -> list[Any]:
        """Gather the values of all processes, by rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def from_first(self, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Run `work` in the first process alone, and return to all what it gives; what it raises there, all raise.

        group: of the processes, if not torch's default one.
        """
        result: Any = None
        if self.rank == 0:
            try:
                result = work()
            except (ValueError, OSError) as error:
                result = error
        if self.world > 1:
            box = [result]
            try:
                dist.broadcast_object_list(box, 0, group)
            except RuntimeError as error:  # the connection is closed, or nothing came for as long as torch waits
                raise RequestError(
                    f"process {self.rank}: the first process of the run died, or gave no answer ({first_line(error)}); "
                    "what it printed says why"
                ) from error
            result = box[0]
        if isinstance(result, Exception):
            if self.rank:
                result.add_note(SAID)
            raise result
        return cast(T, result)

    def largest(self, value: float) -> float:
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()


class Moments:
    """The steps between which the processes ask each other: about every `SECONDS`, and all count the same ones."""

    def __init__(self, team: Team):
        self.team, self._next = team, 0
        self._asked: tuple[int, float] | None = None

    def now(self, step: int) -> bool:
        """Tell if the processes synchronise after this step; one alone always does."""
        if self.team.world == 1 or (self._asked is not None and step == self._asked[0]):
            return True
        if step < self._next:
            return False
        now, ahead = time.monotonic(), 1
        if self._asked is not None:
            steps, seconds = step - self._asked[0], self.team.largest(now - self._asked[1])
            ahead = max(1, min(MOST_STEPS, int(steps * SECONDS / max(seconds, 1e-9))))
        self._asked, self._next = (step, now), step + ahead
        return True


@contextmanager
def joined_team() -> Iterator[Team]:
    """Join the processes that torchrun started; without it this one is alone."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(int(os.environ.get("RANK", 0)), world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
