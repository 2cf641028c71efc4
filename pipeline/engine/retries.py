"""What becomes of a job that failed: again, elsewhere and later; by halves, until the sample that kills is found; or
never. Decisions alone: no ray, no clock, no corpus."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from microdit.pipeline.engine.plan import Job, UnitJob
from microdit.pipeline.stages.stage import Task, UnitTask

BACKOFF_SECONDS = 2.0  # before the second attempt; four times as long before each further one
DEATHS = 2  # of processes on a shard before one of its samples is suspected
MAX_ASIDE = 16  # samples of a shard that may be set aside; with more it is not the samples

MAX_LOST = (
    10  # nodes that a job may lose: it is no fault of its, but one that ends every node must not go round for ever
)

MAX_SEARCHES = 2  # that find nothing


@dataclass
class Search:
    """Which row of a shard kills the process that works on it, by halves.

    `trial` are the rows to try next. First none at all: a stage that dies then does so without any sample's fault. A
    row is taken for the one only when it killed alone.
    """

    rows: int
    low: int = 0
    trial: range = range(0)

    def __post_init__(self) -> None:
        self.high = self.rows

    def died(self) -> int | None:
        """The row, if it was alone; otherwise `trial` is what to try next."""
        if len(self.trial) == 1:
            return self.trial.start
        self.high = self.trial.stop
        self._halve()
        return None

    def survived(self) -> bool:
        """False if no row is left that could be the one."""
        if len(self.trial) and self.trial.stop == self.high:
            return False
        self.low = self.trial.stop
        self._halve()
        return True

    def _halve(self) -> None:
        self.trial = range(self.low, max(self.low + 1, (self.low + self.high) // 2))


@dataclass
class History:
    """What happened to a job so far. `nodes`: where it failed."""

    attempts: int = 0
    deaths: int = 0
    lost: int = 0
    searches: int = 0
    nodes: set[str] = field(default_factory=set)
    aside: dict[int, str] = field(default_factory=dict)
    search: Search | None = None
    error: Mapping[str, Any] = field(default_factory=dict)


class Retries:
    """The histories of the jobs that failed. Those that decide return seconds to wait, or None: set it aside."""

    def __init__(self, max_attempts: int, shard_samples: int):
        self.max_attempts, self.shard_samples = max_attempts, shard_samples
        self.histories: dict[Job | UnitJob, History] = {}

    def of(self, job: Job | UnitJob) -> History:
        return self.histories.get(job) or History()

    def suspected(self, job: Job | UnitJob) -> bool:
        """Whether a process died that worked on it: it may kill the next one."""
        history = self.of(job)
        return history.deaths > 0 or history.search is not None

    def task(self, job: Job) -> Task:
        """What a stage is asked to do now."""
        history = self.of(job)
        rows = history.search.trial if history.search else None
        return Task(job.ref, dict(job.columns), dict(history.aside), rows)

    def unit_task(self, job: UnitJob) -> UnitTask:
        """What ingest is asked to do now: with care once a process died of the unit."""
        return UnitTask(job.unit, job.redo, job.generation, isolated=self.of(job).deaths > 0)

    def done(self, job: Job | UnitJob) -> History:
        """A job came to its end, good or not; its history, which is forgotten."""
        return self.histories.pop(job, None) or History()

    def raised(self, job: Job | UnitJob, error: Mapping[str, Any], node: str | None) -> float | None:
        """An attempt ended with an error."""
        history = self._failed(job, error, node)
        if history.search is not None:  # what the search looks for did not happen
            return self.survived(job)
        history.attempts += 1
        return self._again(history)

    def died(self, job: Job | UnitJob, reason: str, error: Mapping[str, Any], node: str | None) -> float | None:
        """The process that worked on it is gone: `reason` is `crash` or `stall`."""
        history = self._failed(job, error, node)
        if history.search is not None:
            if not history.search.trial:
                return None  # it takes no sample to kill this stage
            if (row := history.search.died()) is not None:
                history.aside[row] = reason
                history.search = None
            return 0.0
        history.deaths += 1
        history.attempts += 1
        suspects = isinstance(job, Job) and history.deaths >= min(DEATHS, self.max_attempts)
        if suspects and len(history.aside) < MAX_ASIDE and history.searches < MAX_SEARCHES:
            history.search = Search(self.shard_samples)
            return 0.0
        return self._again(history)

    def survived(self, job: Job | UnitJob) -> float | None:
        """A trial of some rows came to its end."""
        history = self.histories[job]
        assert history.search is not None
        if history.search.survived():
            return 0.0
        # all of it was worked on, in parts, and nothing died: what killed came from outside, or was too much at once
        history.search = None
        history.searches += 1
        history.deaths = 0
        history.attempts = min(history.attempts, 1)
        return self._again(history)

    def lost(self, job: Job | UnitJob, error: Mapping[str, Any], node: str | None) -> float | None:
        """The node that worked on it is gone, or the machine was out of memory: no fault of the job's."""
        history = self._failed(job, error, node)
        history.lost += 1
        return None if history.lost > MAX_LOST else BACKOFF_SECONDS

    def _failed(self, job: Job | UnitJob, error: Mapping[str, Any], node: str | None) -> History:
        history = self.histories.setdefault(job, History())
        history.error = error
        if node is not None:
            history.nodes.add(node)
        return history

    def _again(self, history: History) -> float | None:
        if history.attempts >= self.max_attempts:
            return None
        return BACKOFF_SECONDS * 4 ** (history.attempts - 1)
