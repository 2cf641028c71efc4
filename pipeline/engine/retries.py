"""Decide whether a job that failed is tried again: later and on another node, in halves to find a deadly row, or never.

No ray and no corpus.
"""

import heapq
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.engine.messages import ErrorReport
from microdit.pipeline.engine.plan import Job, UnitJob
from microdit.pipeline.stages.stage import Task, UnitTask

BACKOFF_SECONDS = 2.0  # before the second attempt; four times as long before each further one
DEATHS = 2  # of processes on a shard before one of its samples is suspected
MAX_ASIDE = 16  # samples of a shard that may be set aside; with more it is not the samples
MAX_LOST = 10  # nodes that a job may lose by no fault of its own: one that ends every node must not go round for ever
MAX_SEARCHES = 2  # that find nothing
EXPIRED_SECONDS = 600.0  # to wait for new credentials of a bucket; each try of a job waits for a part of it
MAX_REJECTED = 3  # shards of a stage in a row that a server rejects: it would reject the others, too


@dataclass
class Search:
    """Bisect a shard for the row that kills the process that works on it.

    `trial` are the rows to try next. The first trial has no row: a stage that dies then does so without any sample's
    fault. A row is blamed only if it killed the process alone.
    """

    rows: int
    low: int = 0
    trial: range = range(0)

    def __post_init__(self) -> None:
        self.high = self.rows

    def died(self) -> int | None:
        """Return the row to blame if it was alone in the trial; otherwise set the next `trial`."""
        if len(self.trial) == 1:
            return self.trial.start
        self.high = self.trial.stop
        self._halve()
        return None

    def survived(self) -> bool:
        """Set the next `trial`; return False if no row is left to suspect."""
        if len(self.trial) and self.trial.stop == self.high:
            return False
        self.low = self.trial.stop
        self._halve()
        return True

    def _halve(self) -> None:
        self.trial = range(self.low, max(self.low + 1, (self.low + self.high) // 2))


@dataclass
class History:
    """The failures of a job so far."""

    attempts: int = 0
    deaths: int = 0
    lost: int = 0
    searches: int = 0
    """Searches that found no row."""
    nodes: set[str] = field(default_factory=set)
    """Nodes on which it failed."""
    aside: dict[int, str] = field(default_factory=dict)
    """Rows that are set aside, and the reason."""
    search: Search | None = None
    error: ErrorReport | None = None
    """The last error."""


class Retries:
    """Histories of the jobs that failed.

    `raised`, `died`, `survived` and `lost` return the seconds to wait before the next attempt, or None: set it aside.
    """

    def __init__(self, max_attempts: int, shard_samples: int):
        self.max_attempts, self.shard_samples = max_attempts, shard_samples
        self.histories: dict[Job | UnitJob, History] = {}
        self._rejected: dict[int, set[str]] = {}
        self._expired_since: float | None = None
        self.news: list[str] = []
        """Messages for people that nobody has taken yet."""

    def of(self, job: Job | UnitJob) -> History:
        """Return a job's history; an empty one if it never failed."""
        return self.histories.get(job) or History()

    def suspected(self, job: Job | UnitJob) -> bool:
        """Return True if a process died that worked on the job: it may kill the next one."""
        history = self.of(job)
        return history.deaths > 0 or history.search is not None

    def task(self, job: Job) -> Task:
        """Return the next task of a shard for its stage."""
        history = self.of(job)
        rows = history.search.trial if history.search else None
        return Task(job.ref, dict(job.columns), dict(history.aside), rows, dict(job.again))

    def unit_task(self, job: UnitJob) -> UnitTask:
        """Return the next task of a unit for ingest: with isolated decoding once a process died of the unit."""
        return UnitTask(job.unit, job.redo, job.generation, isolated=self.of(job).deaths > 0)

    def done(self, job: Job | UnitJob) -> History:
        """Forget a job that is done or set aside, and return its history."""
        self._expired_since = None
        return self.histories.pop(job, None) or History()

    def raised(self, job: Job | UnitJob, error: ErrorReport, node: str | None) -> float | None:
        """Count an attempt that ended with an error."""
        history = self._failed(job, error, node)
        if error.credentials_expired:  # no attempt, and no sample's fault
            return self._wait_for_credentials(error)
        if history.search is not None:  # what the search looks for did not happen
            return self.survived(job)
        history.attempts += 1
        return None if error.is_final else self._again(history)

    def _wait_for_credentials(self, error: ErrorReport) -> float:
        """Return the seconds until a job that cannot reach its bucket is tried again.

        Raises:
            RequestError: that has gone on for `EXPIRED_SECONDS`.
        """
        now = time.monotonic()
        if self._expired_since is None:
            self._expired_since = now
            self.news.append(f"{error.message} (for {EXPIRED_SECONDS / 60:.0f} minutes new ones are waited for)")
        if now - self._expired_since > EXPIRED_SECONDS:
            raise RequestError(
                f"{error.message}. None came in {EXPIRED_SECONDS / 60:.0f} minutes: run the same command again then"
            )
        return BACKOFF_SECONDS

    def died(
        self, job: Job | UnitJob, reason: Literal["crash", "stall"], error: ErrorReport, node: str | None
    ) -> float | None:
        """Count an attempt whose process ended."""
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
        """Go on with the search after a trial that killed no process."""
        history = self.histories[job]
        assert history.search is not None
        if history.search.survived():
            return 0.0
        # every row was worked on, in parts, and no process died: the cause was outside, or all at once were too much
        history.search = None
        history.searches += 1
        history.deaths = 0
        history.attempts = min(history.attempts, 1)
        return self._again(history)

    def answered(self, job: Job, error: ErrorReport | None) -> None:
        """Note whether a server answered what a shard asked for, or rejected it; other errors say neither.

        Raises:
            RequestError: it rejected `MAX_REJECTED` shards of the stage in a row.
        """
        if error is None:
            self._rejected.pop(job.stage, None)
        elif error.server_rejects:
            shards = self._rejected.setdefault(job.stage, set())
            shards.add(job.shard)
            if len(shards) >= MAX_REJECTED:
                raise RequestError(
                    f"{error.message}; so it was with {len(shards)} shards in a row, of which nothing was committed. "
                    "Mend the server or the column's options, and run the same command again"
                )

    def lost(self, job: Job | UnitJob, error: ErrorReport, node: str | None) -> float | None:
        """Count a node that is gone, or was out of memory: not the job's fault, so not an attempt."""
        history = self._failed(job, error, node)
        history.lost += 1
        return None if history.lost > MAX_LOST else BACKOFF_SECONDS

    def _failed(self, job: Job | UnitJob, error: ErrorReport, node: str | None) -> History:
        history = self.histories.setdefault(job, History())
        history.error = error
        if node is not None:
            history.nodes.add(node)
        return history

    def _again(self, history: History) -> float | None:
        if history.attempts >= self.max_attempts:
            return None
        return BACKOFF_SECONDS * 4 ** (history.attempts - 1)


class DelayedJobs:
    """Jobs that wait for their next attempt."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job | UnitJob]] = []
        self._count = itertools.count()  # jobs of one time are not compared

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Job | UnitJob]:
        return (job for _, _, job in self._heap)

    def add(self, job: Job | UnitJob, seconds: float) -> None:
        """Delay a job."""
        heapq.heappush(self._heap, (time.monotonic() + seconds, next(self._count), job))

    def take_due(self) -> Iterator[Job | UnitJob]:
        """Take the jobs whose time has come, the earliest first."""
        now = time.monotonic()
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[2]
