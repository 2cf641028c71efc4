"""What a build has done so far, for people, for machines and for Ray's dashboard."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from microdit.pipeline.base.progress import Line, Progress, Snapshot, Tally
from microdit.pipeline.corpus.names import IMAGES, UNITS
from microdit.pipeline.engine.metrics import Metrics
from microdit.pipeline.engine.plan import Job, Plan, UnitJob
from microdit.pipeline.engine.summary import Work

EVERY = 0.25  # seconds between two pictures of it
INGEST = "ingest"


class Board:
    """Kept by the driver; shown by `progress` (None shows nothing)."""

    def __init__(self, stages: Sequence[str], progress: Progress | None):
        self.stages = list(stages)
        self.tallies = [Tally() for _ in stages]
        self.ingest = Tally()
        self.work: dict[str, Work] = {}
        self._progress, self._notes, self._shown = progress, list[str](), 0.0
        self._began = time.monotonic()
        self._metrics = Metrics()

    def say(self, note: str) -> None:
        """One line for people, with the next picture."""
        self._notes.append(note)

    def begin(self, job: Job | UnitJob) -> None:
        (self.ingest if isinstance(job, UnitJob) else self.tallies[job.stage]).begin()

    def made(self, job: Job, made: Mapping[str, Mapping[str, Any]]) -> None:
        """A job wrote these columns, each with its counts, `seconds` and `bytes`."""
        for column, counts in made.items():
            self._count(column, counts)
        if made:
            widest = max(made.values(), key=lambda counts: counts["in"])
            size = sum(counts["bytes"] for counts in made.values())
            busy = max(counts.get("encode_seconds", counts["seconds"]) for counts in made.values())
            self.tallies[job.stage].add(1, widest["in"], widest["failed"], size, busy)
            self._metrics.made(self.stages[job.stage], widest["in"], widest["failed"], size)

    def ingested(self, counts: Mapping[str, Any]) -> None:
        """A shard of images was written."""
        self._count(IMAGES, counts)
        self.ingest.add(0, counts["in"], counts["failed"], counts["bytes"])
        self._metrics.made(INGEST, counts["in"], counts["failed"], counts["bytes"])

    def unit_read(self) -> None:
        self.ingest.add(1)

    def _count(self, column: str, counts: Mapping[str, Any]) -> None:
        did = self.work.setdefault(column, Work(first=time.monotonic() - counts["seconds"]))
        did.shards += 1
        did.samples += counts["in"]
        did.seconds += counts["seconds"]
        did.last = time.monotonic()

    # -- showing -------------------------------------------------------------------------------------------------------

    def due(self, last: bool) -> bool:
        """Is it time for another picture?"""
        return last or time.monotonic() - self._shown >= EVERY

    def show(
        self, plan: Plan, running: Sequence[Job | UnitJob | None], loading: Collection[int], holding: Sequence[int]
    ) -> None:
        """Show where the plan stands; the stages that load their models, and one entry for each actor that has one."""
        self._shown = time.monotonic()
        notes, self._notes = self._notes, []
        lines = list(self._lines(plan, running, loading, holding))
        for line in lines:
            self._metrics.state(line)
        if self._progress is not None:
            self._progress(Snapshot(self._shown - self._began, lines, notes))

    def _lines(
        self, plan: Plan, running: Sequence[Job | UnitJob | None], loading: Collection[int], holding: Sequence[int]
    ) -> Iterator[Line]:
        units = sum(isinstance(job, UnitJob) for job in running)
        if IMAGES in plan.columns:
            line = Line(INGEST, "units", plan.units_done, plan.units_total, aside=len(plan.aside[UNITS]), running=units)
            yield _rated(line, self.ingest)
        more = bool(plan.units) or units > 0
        for i, stage in enumerate(plan.stages):
            columns = [column for column, _, _ in plan.targets[i]]
            if columns:
                line = Line(stage.name, "shards", min(plan.done[c] for c in columns), plan.shards, more=more)
                line.aside = max(len(plan.aside[c]) for c in columns)
                line.running = sum(isinstance(job, Job) and job.stage == i for job in running)
                line.workers = sum(j == i for j in holding)
                line.state = "loading its model" if i in loading and not line.running else ""
                yield _rated(line, self.tallies[i])


def _rated(line: Line, tally: Tally) -> Line:
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
