"""Show how far a build is: to people, to machines and on Ray's dashboard."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence

from microdit.pipeline.base.progress import Line, Progress, Snapshot, Tally
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.engine.messages import ShardWork
from microdit.pipeline.engine.metrics import Metrics
from microdit.pipeline.engine.plan import Job, Plan, UnitJob
from microdit.pipeline.engine.summary import Work

SNAPSHOT_EVERY = 0.25  # seconds
INGEST = "ingest"


class Board:
    """Figures of a build, kept by the driver and shown by `progress` (None shows nothing).

    Attributes:
        tallies: one for each stage.
        ingest: the tally of ingest.
        work: by column what this run did.
    """

    def __init__(self, stages: Sequence[str], progress: Progress | None):
        self.stages = list(stages)
        self.tallies = [Tally() for _ in stages]
        self.ingest = Tally()
        self.work: dict[str, Work] = {}
        self._progress, self._notes, self._shown = progress, list[str](), 0.0
        self._began = time.monotonic()
        self._metrics = Metrics()

    def note(self, text: str) -> None:
        """Show a line to people, with the next snapshot."""
        self._notes.append(text)

    def begin(self, job: Job | UnitJob) -> None:
        """Count a job that was submitted."""
        (self.ingest if isinstance(job, UnitJob) else self.tallies[job.stage]).begin()

    def written(self, job: Job, columns: Mapping[str, ShardWork]) -> None:
        """Count the columns of a shard that a job wrote."""
        for column, work in columns.items():
            self._count(column, work)
        if columns:
            widest = max(columns.values(), key=lambda work: work.inputs)
            size = sum(work.bytes for work in columns.values())
            busy = max(work.busy_seconds for work in columns.values())
            self.tallies[job.stage].add(1, widest.inputs, widest.failed, size, busy)
            self._metrics.written(self.stages[job.stage], widest.inputs, widest.failed, size)

    def ingested(self, work: ShardWork) -> None:
        """Count a shard of images that was written."""
        self._count(IMAGES, work)
        self.ingest.add(0, work.inputs, work.failed, work.bytes)
        self._metrics.written(INGEST, work.inputs, work.failed, work.bytes)

    def unit_read(self) -> None:
        """Count a unit that is complete."""
        self.ingest.add(1)

    def _count(self, column: str, work: ShardWork) -> None:
        total = self.work.setdefault(column, Work(first=time.monotonic() - work.seconds))
        total.shards += 1
        total.samples += work.inputs
        total.seconds += work.seconds
        total.cut += work.cut
        total.last = time.monotonic()

    # -- showing -------------------------------------------------------------------------------------------------------

    def due(self, last: bool) -> bool:
        """Return True if it is time for another snapshot."""
        return last or time.monotonic() - self._shown >= SNAPSHOT_EVERY

    def show(
        self, plan: Plan, running: Sequence[Job | UnitJob | None], loading: Collection[int], holding: Sequence[int]
    ) -> None:
        """Show where the plan stands.

        Args:
            running: the job of every call that has not ended.
            loading: the stages that load their models, and above those, of sources.
            holding: the stage of every actor that has loaded one, or above those, whose model of a source it is.
        """
        self._shown = time.monotonic()
        notes, self._notes = self._notes, []
        lines = list(self._lines(plan, running, loading, holding))
        for line in lines:
            self._metrics.show(line)
        if self._progress is not None:
            self._progress(Snapshot(self._shown - self._began, lines, notes))

    def _lines(
        self, plan: Plan, running: Sequence[Job | UnitJob | None], loading: Collection[int], holding: Sequence[int]
    ) -> Iterator[Line]:
        units = sum(isinstance(job, UnitJob) for job in running)
        if IMAGES in plan.columns:
            line = Line(INGEST, "units", plan.units_done, plan.units_total, aside=len(plan.aside[UNITS]), running=units)
            if not units and any(holder >= len(plan.stages) for holder in loading):
                line.state = "loading its model"
            yield _rated(line, self.ingest)
        more = bool(plan.units) or units > 0
        for i, stage in enumerate(plan.stages):
            columns = [target.column for target in plan.targets[i]]
            if columns:
                line = Line(stage.name, "shards", min(plan.done[c] for c in columns), plan.shards, more=more)
                line.aside = max(len(plan.aside[c]) for c in columns)
                line.running = sum(isinstance(job, Job) and job.stage == i for job in running)
                line.workers = sum(j == i for j in holding)
                line.state = "loading its model" if i in loading and not line.running else ""
                yield _rated(line, self.tallies[i])


def _rated(line: Line, tally: Tally) -> Line:
    """Fill in the line's samples, rates, time left and state."""
    rates = tally.rates()
    line.samples, line.failed, line.rate = tally.samples, tally.failed, rates.samples
    line.bytes_rate = rates.bytes
    if line.workers and rates.busy is not None:
        line.busy = min(1.0, rates.busy / line.workers)
    open_jobs = line.total - line.done - line.aside
    if rates.jobs and open_jobs > 0:
        line.left = open_jobs / rates.jobs
    if line.aside:
        line.state = f"{line.aside} set aside"
    elif not line.state:
        line.state = (
            f"{line.running} at work" if line.running else ("waiting" if open_jobs > 0 or line.more else "done")
        )
    return line
