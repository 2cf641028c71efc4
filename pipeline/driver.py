"""The driver of a build: hands out what the plan says, downstream stages first, and takes back what comes of it.

It keeps no state that matters: the plan comes from listings, and what has become ready from the workers' messages. Kill
it and start it again, and the listing says where to go on.
"""

import heapq
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from pipeline import workers
from pipeline.corpus import Corpus
from pipeline.errors import RequestError
from pipeline.failures import write_failure
from pipeline.places import Places
from pipeline.plan import Job, Plan, UnitJob
from pipeline.progress import Line, Progress, Snapshot, Tally
from pipeline.records import UNITS
from pipeline.sources import Source
from pipeline.stages import IMAGES
from pipeline.summary import Work

IDLE_SECONDS = 30.0  # a stage that waits for work longer than this gives its model's place back
CROWDED_SECONDS = 10.0  # the same while another stage has waited as long for a place
PER_ACTOR = 2  # shards with an actor: one running, one waiting
GRACE_SECONDS = 15.0  # for the shards in flight when a signal comes
BACKOFF_SECONDS = 1.0  # before the second attempt; twice as long before each further one
RESOURCES_EVERY = 5.0  # seconds between two looks at the cluster's size


@dataclass
class Actor:
    """A stage's actor, and what it has in hand, first in first out."""

    handle: Any
    stage: int
    began: float
    placed: bool = False
    ready: bool = False
    refs: list[Any] = field(default_factory=list)
    idle_since: float = 0.0


@dataclass
class Flight:
    """One call that was submitted: a job (none: the actor's `load`), and the actor if it has one."""

    job: Job | UnitJob | None
    actor: Actor | None = None


class Driver:
    """One build's driver: `run` ends when nothing can be done any more."""

    def __init__(
        self,
        corpus: Corpus,
        plan: Plan,
        sources: Sequence[Source],
        ingest: workers.Ingest,
        max_attempts: int,
        resources: dict[str, float],
        progress: Progress | None,
    ):
        self.corpus, self.plan, self.progress = corpus, plan, progress
        self.max_attempts, self.resources = max_attempts, resources
        self.order = plan.downstream_first()
        self.upstream = [plan.upstream(stage) for stage in range(len(plan.stages))]
        self.is_model = [stage.device == "gpu" for stage in plan.stages]
        self.flights: dict[Any, Flight] = {}
        self.actors: list[Actor] = []
        self.delayed: list[tuple[float, int, Job | UnitJob]] = []
        self.failed_attempts: dict[Job | UnitJob, int] = {}
        self.lost_actors = [0] * len(plan.stages)
        self.tallies = [Tally() for _ in plan.stages]
        self.ingest_tally = Tally()
        self.work: dict[str, Work] = {}
        self.notes: list[str] = []
        self.stop: int | None = None
        self.began = time.monotonic()
        self._count = itertools.count()
        self._reported = self._looked = 0.0
        self._ingest: Any = ray.remote(max_retries=0, num_returns="streaming")(workers.ingest)
        self._task: Any = ray.remote(max_retries=0)(workers.stage_task)
        self._actor: Any = ray.remote(max_restarts=0, max_task_retries=0)(workers.StageActor)
        corpus_ref = ray.put(corpus)
        self._ingest_ref = ray.put((corpus, ingest))
        self._source_refs = {source.name: ray.put(source) for source in sources}
        self._stage_refs = [[corpus_ref, ray.put(stage)] for stage in plan.stages]
        self._look()

    def _look(self) -> None:
        """How large the cluster is now: nodes come and go."""
        if (now := time.monotonic()) - self._looked >= RESOURCES_EVERY:
            self._looked = now
            found = ray.cluster_resources()
            models = sum(bool(targets) and self.is_model[i] for i, targets in enumerate(self.plan.targets))
            self.places = Places.on(max(found.get("CPU", 0.0), 1.0), found.get("GPU", 0.0), models, **self.resources)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Carry the plan out; returns early, with `stop` set, after a signal."""
        while self.stop is None:
            self._look()
            self._submit()
            if not self.flights and not self.delayed:
                break
            self._collect(0.2)
            self._report()
        else:
            self._drain()
        self._report(last=True)

    def _collect(self, timeout: float) -> None:
        if not self.flights:
            time.sleep(timeout)
            return
        done, rest = ray.wait(list(self.flights), num_returns=1, timeout=timeout, fetch_local=False)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        for ref in done:
            if ref in self.flights:
                self._receive(ref, self.flights[ref])

    def _drain(self) -> None:
        """After a signal: shards in flight may end, units are dropped (their shards that are committed stay)."""
        for ref, flight in list(self.flights.items()):
            if not isinstance(flight.job, Job):
                del self.flights[ref]
        until = time.monotonic() + GRACE_SECONDS
        if self.flights:
            self.notes.append(f"stopping: {len(self.flights)} shards in flight get {GRACE_SECONDS:.0f} s to end")
        while self.flights and time.monotonic() < until:
            self._collect(0.2)
            self._report()

    # -- handing out ---------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        now = time.monotonic()
        while self.delayed and self.delayed[0][0] <= now:
            self.plan.requeue(heapq.heappop(self.delayed)[2])
        for stage in self.order:
            if self.is_model[stage]:
                self._serve_model(stage)
            else:
                while self._in_flight() < self.places.tasks and (job := self.plan.take(stage)):
                    self._start(job)
        while self.plan.units and self._ingesting() < self.places.ingests:
            self._start(self.plan.units.popleft())
        self._release_idle(now)

    def _in_flight(self) -> int:
        return sum(isinstance(f.job, Job) and f.actor is None for f in self.flights.values())

    def _ingesting(self) -> int:
        return sum(isinstance(f.job, UnitJob) for f in self.flights.values())

    def _start(self, job: Job | UnitJob) -> None:
        if isinstance(job, UnitJob):
            options = {"num_cpus": self.places.ingest_cpu, "name": f"ingest {job.source}"}
            ref = self._ingest.options(**options).remote([self._ingest_ref, self._source_refs[job.source]], job.unit)
            self.ingest_tally.begin()
        else:
            options = {"num_cpus": self.places.task_cpu, "name": self.plan.stages[job.stage].name}
            ref = self._task.options(**options).remote(self._stage_refs[job.stage], job.ref, job.columns)
            self.tallies[job.stage].begin()
        self.flights[ref] = Flight(job)

    def _give(self, actor: Actor, job: Job) -> None:
        ref = actor.handle.run.remote(job.ref, job.columns)
        actor.refs.append(ref)
        self.flights[ref] = Flight(job, actor)
        self.tallies[job.stage].begin()

    def _serve_model(self, stage: int) -> None:
        """Shards for the stage's actors, and an actor more if they are behind and there is a place."""
        mine = [actor for actor in self.actors if actor.stage == stage]
        for depth in range(1, PER_ACTOR + 1):
            for actor in mine:
                if actor.ready and len(actor.refs) < depth and (job := self.plan.take(stage)):
                    self._give(actor, job)
        backlog = len(self.plan.ready[stage])
        if not backlog or any(not actor.ready for actor in mine):
            return
        kept = {s for s in range(len(self.plan.stages)) if self._wants_model(s)} - {a.stage for a in self.actors}
        room = len(self.actors) + len(kept - {stage}) < self.places.actors
        more = len(mine) < self.places.actors_per_stage and backlog >= PER_ACTOR * len(mine)
        if not mine or (room and more):
            options = {"num_cpus": self.places.actor_cpu, "num_gpus": self.places.actor_gpu}
            handle = self._actor.options(**options).remote(self._stage_refs[stage])
            actor = Actor(handle, stage, time.monotonic())
            actor.refs = [handle.place.remote(), handle.load.remote()]
            self.actors.append(actor)
            self.flights |= {ref: Flight(None, actor) for ref in actor.refs}

    def _release_idle(self, now: float) -> None:
        """Give back the places of models that have nothing to do."""
        crowded = any(not actor.placed and now - actor.began > CROWDED_SECONDS for actor in self.actors)
        for actor in [actor for actor in self.actors if actor.ready and not actor.refs]:
            idle = now - actor.idle_since
            if self._finished(actor.stage) or idle > IDLE_SECONDS or (crowded and idle > CROWDED_SECONDS):
                self._dismiss(actor)

    def _wants_model(self, stage: int) -> bool:
        return self.is_model[stage] and bool(self.plan.targets[stage]) and not self._finished(stage)

    def _finished(self, stage: int) -> bool:
        """True if no more work can come for a stage."""
        jobs = [f.job for f in self.flights.values()] + [entry[2] for entry in self.delayed]
        if self.plan.units or any(isinstance(job, UnitJob) for job in jobs):
            return False
        busy = {job.stage for job in jobs if isinstance(job, Job)}
        return all(s not in busy and not self.plan.ready[s] for s in {stage, *self.upstream[stage]})

    def _dismiss(self, actor: Actor) -> None:
        self.actors.remove(actor)
        ray.kill(actor.handle)

    # -- taking back ---------------------------------------------------------------------------------------------------

    def _receive(self, ref: Any, flight: Flight) -> None:
        message: dict[str, Any]
        try:
            message = ray.get(next(ref) if isinstance(flight.job, UnitJob) else ref)
        except StopIteration:
            message = {"error": {"message": "the worker ended without an answer", "traceback": "", "request": False}}
        except ray.exceptions.RayError as error:  # the process or its node is gone
            self._lost(ref, flight, error)
            return
        if message.get("error", {}).get("request"):
            raise RequestError(message["error"]["message"])
        if isinstance(flight.job, UnitJob):
            self._ingested(ref, flight.job, message)
            return
        del self.flights[ref]
        if flight.actor is not None:
            flight.actor.refs.remove(ref)
            flight.actor.idle_since = time.monotonic()
            flight.actor.placed = True
            flight.actor.ready |= not message.get("placed")
        if flight.job is None or message.get("load"):
            if "error" in message:
                assert flight.actor is not None or isinstance(flight.job, Job)
                stage = flight.actor.stage if flight.actor is not None else flight.job.stage  # type: ignore[union-attr]
                raise RequestError(
                    f"stage {self.plan.stages[stage].name}: it cannot be loaded: {message['error']['message']}"
                )
            return
        for column, counts in message["made"].items():
            self._made(flight.job, column, counts)
        if "error" in message:
            self._attempt_failed(flight.job, message["error"])
        else:
            counts = max(message["made"].values(), key=lambda c: c["in"])
            self.tallies[flight.job.stage].add(1, counts["in"], counts["failed"])
            self.failed_attempts.pop(flight.job, None)
            self.plan.release(flight.job)

    def _made(self, job: Job, column: str, counts: dict[str, Any]) -> None:
        self.plan.committed(job.source, job.shard, column)
        self._count_work(column, counts)

    def _count_work(self, column: str, counts: dict[str, Any]) -> None:
        did = self.work.setdefault(column, Work(first=time.monotonic() - counts.get("seconds", 0.0)))
        did.shards += 1
        did.samples += counts.get("in", 0)
        did.seconds += counts.get("seconds", 0.0)
        did.last = time.monotonic()

    def _ingested(self, ref: Any, job: UnitJob, message: dict[str, Any]) -> None:
        """A message of a unit that is being read: a shard is committed, the whole is, or it failed."""
        if "error" in message:
            del self.flights[ref]
            self._attempt_failed(job, message["error"])
        elif "unit" in message:
            del self.flights[ref]
            for shard in message["shards"]:
                self.plan.committed(job.source, shard, IMAGES)
            self.plan.unit_committed(job.source, job.unit)
            self.failed_attempts.pop(job, None)
            self.ingest_tally.add(1)
        elif "shard" in message and self.plan.committed(job.source, message["shard"], IMAGES):
            self._count_work(IMAGES, message)
            self.ingest_tally.add(0, message.get("in", 0), message.get("failed", 0))

    def _attempt_failed(self, job: Job | UnitJob, error: dict[str, Any]) -> None:
        tries = self.failed_attempts[job] = self.failed_attempts.get(job, 0) + 1
        stage = "ingest" if isinstance(job, UnitJob) else self.plan.stages[job.stage].name
        name = job.unit if isinstance(job, UnitJob) else job.shard
        if tries < self.max_attempts:
            heapq.heappush(
                self.delayed, (time.monotonic() + BACKOFF_SECONDS * 2 ** (tries - 1), next(self._count), job)
            )
            return
        del self.failed_attempts[job]
        for column in self.plan.set_aside(job):
            what = {"stage": stage, "attempts": tries, "message": error["message"], "traceback": error["traceback"]}
            write_failure(self.corpus, column, job.source, name, **what)
        self.notes.append(f"{stage}: {name} is set aside after {tries} attempts: {error['message'].splitlines()[0]}")

    def _lost(self, ref: Any, flight: Flight, error: Exception) -> None:
        """A process is gone. What it was working on is blamed; what only waited there is handed out again."""
        del self.flights[ref]
        actor = flight.actor
        raised = isinstance(error, ray.exceptions.RayTaskError)  # not by a stage, but around it
        message = str(error.cause) if raised else f"the process that worked on it died: {error}"  # type: ignore[attr-defined]
        told = {"message": message, "traceback": str(error)}
        if actor is None:
            assert flight.job is not None
            self._attempt_failed(flight.job, told)
            return
        if actor in self.actors:
            self._dismiss(actor)
        if flight.job is None:
            if actor.refs[0] != ref:  # `place` and `load` are lost together, and count once
                return
            self.lost_actors[actor.stage] += 1
            if self.lost_actors[actor.stage] >= self.max_attempts:
                name = self.plan.stages[actor.stage].name
                raise RequestError(
                    f"stage {name}: the process that loads its model died {self.max_attempts} times: {error}"
                )
        elif actor.refs[0] == ref:
            self._attempt_failed(flight.job, told)
        else:
            self.plan.requeue(flight.job)

    # -- telling -------------------------------------------------------------------------------------------------------

    def _report(self, last: bool = False) -> None:
        now = time.monotonic()
        if self.progress is None or (not last and now - self._reported < 0.25):
            return
        self._reported = now
        notes, self.notes = self.notes, []
        self.progress(Snapshot(now - self.began, list(self._lines()), notes))

    def _lines(self) -> Iterator[Line]:
        jobs = [(flight.job, flight.actor) for flight in self.flights.values()]
        plan = self.plan
        if IMAGES in plan.columns:
            units = sum(isinstance(job, UnitJob) for job, _ in jobs)
            line = Line(
                "ingest", "units", plan.units_done, plan.units_total, aside=len(plan.aside[UNITS]), running=units
            )
            yield self._rated(line, self.ingest_tally)
        more = bool(plan.units) or any(isinstance(job, UnitJob) for job, _ in jobs)
        for i, stage in enumerate(plan.stages):
            columns = [column for column, _, _ in plan.targets[i]]
            if columns:
                line = Line(stage.name, "shards", min(plan.done[c] for c in columns), plan.shards, more=more)
                line.aside = max(len(plan.aside[c]) for c in columns)
                line.running = sum(isinstance(job, Job) and job.stage == i for job, _ in jobs)
                loading = any(job is None and actor is not None and actor.stage == i for job, actor in jobs)
                line.state = "loading its model" if loading else ""
                yield self._rated(line, self.tallies[i])

    def _rated(self, line: Line, tally: Tally) -> Line:
        jobs, line.rate = tally.rates()
        line.samples, line.failed = tally.samples, tally.failed
        open_jobs = line.total - line.done - line.aside
        if jobs and open_jobs > 0:
            line.left = open_jobs / jobs
        if line.aside:
            line.state = f"{line.aside} set aside"
        elif not line.state:
            line.state = (
                f"{line.running} at work" if line.running else ("waiting" if open_jobs > 0 or line.more else "done")
            )
        return line
