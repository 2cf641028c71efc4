"""The driver of a build: hands out what the plan says, downstream stages first, and takes back what comes of it.

It keeps no state that matters: the plan comes from listings, and what has become ready from the workers' messages. Kill
it and start it again, and the listing says where to go on.
"""

import heapq
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from obstore.exceptions import BaseError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import write_failure
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.engine import cluster, workers
from microdit.pipeline.engine.actors import CROWDED_SECONDS, IDLE_SECONDS, PER_ACTOR, Actor
from microdit.pipeline.engine.board import Board
from microdit.pipeline.engine.layout import Actors, Places
from microdit.pipeline.engine.plan import Job, Plan, UnitJob
from microdit.pipeline.engine.retries import Retries
from microdit.pipeline.sources.source import Source

GRACE_SECONDS = 15.0  # for the shards in flight when a signal comes
RESOURCES_EVERY = 5.0  # seconds between two looks at the cluster's size
LOOK_SECONDS = 60.0  # for every node to say that it sees the corpus


@dataclass
class Flight:
    """One call that was submitted: a job (none: the actor's `place` and `load`), and the actor if it has one."""

    job: Job | UnitJob | None
    actor: Actor | None = None
    began: float | None = None
    node: str | None = None


class Driver:
    """One build's driver: `run` ends when nothing can be done any more."""

    def __init__(
        self,
        corpus: Corpus,
        plan: Plan,
        sources: Sequence[Source],
        ingest: workers.Ingest,
        retries: Retries,
        shared: workers.Shared,
        resources: Mapping[str, float],
        board: Board,
    ):
        self.corpus, self.plan, self.retries, self.board = corpus, plan, retries, board
        self.resources, self.stall_timeout = dict(resources), shared.stall_timeout
        self.most = self.resources.pop("cpus", None), self.resources.pop("gpus", None)
        self.order = plan.downstream_first()
        self.upstream = [plan.upstream(stage) for stage in range(len(plan.stages))]
        self.device = [stage.device for stage in plan.stages]
        self.at_once = [getattr(stage, "at_once", 1) for stage in plan.stages]
        self.flights: dict[Any, Flight] = {}
        self.actors: list[Actor] = []
        self.delayed: list[tuple[float, int, Job | UnitJob]] = []
        self.lost_actors = [0] * len(plan.stages)
        self.stop: int | None = None
        self._count = itertools.count()
        self._looked = 0.0
        self._ingest: Any = ray.remote(max_retries=0, num_returns="streaming")(workers.ingest)
        self._task: Any = ray.remote(max_retries=0, num_returns="streaming")(workers.stage_task)
        self._actor: Any = ray.remote(max_restarts=0, max_task_retries=0)(workers.StageActor)
        self._shared, ingest_ref = ray.put(shared), ray.put(ingest)
        self._source_refs = {source.name: [self._shared, ingest_ref, ray.put(source)] for source in sources}
        self._stage_refs = [[self._shared, ray.put(stage)] for stage in plan.stages]
        self._look()

    def _look(self) -> None:
        """How large the cluster is now: nodes come and go."""
        if (now := time.monotonic()) - self._looked >= RESOURCES_EVERY:
            self._looked = now
            self.nodes = cluster.nodes()
            models = [device for device, targets in zip(self.device, self.plan.targets, strict=True) if targets]
            on_gpus, on_cpus = models.count("gpu"), models.count("cpu")
            self.places = Places.on(*cluster.size(*self.most), on_gpus, on_cpus, **self.resources)

    def check_nodes(self) -> None:
        """Make sure that every node sees the corpus.

        Raises:
            RequestError: one does not.
        """
        task: Any = ray.remote(num_cpus=0)(workers.look_from_here)
        refs = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote([self._shared])
            for node in self.nodes
        ]
        for ref in ray.wait(refs, num_returns=len(refs), timeout=LOOK_SECONDS)[0] if refs else ():
            try:
                message = ray.get(ref)
            except ray.exceptions.RayError:
                continue  # the node is gone; its successor looks when it works for the first time
            if "error" in message:
                raise RequestError(message["error"]["message"])

    def ask_to_stop(self, signum: int) -> None:
        """End `run` soon, because this signal came."""
        self.stop = signum

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
            self.board.say(f"stopping: {len(self.flights)} shards in flight get {GRACE_SECONDS:.0f} s to end")
        while self.flights and time.monotonic() < until:
            self._collect(0.2)
            self._report()

    # -- handing out ---------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        now = time.monotonic()
        while self.delayed and self.delayed[0][0] <= now:
            self.plan.requeue(heapq.heappop(self.delayed)[2])
        for stage in self.order:
            if self.device[stage]:
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
        elsewhere = [node for node in self.nodes if node not in self.retries.of(job).nodes]
        options: dict[str, Any] = {}
        if elsewhere and len(elsewhere) < len(self.nodes):
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(random.choice(elsewhere), soft=True)
        if isinstance(job, UnitJob):
            call = self._ingest.options(num_cpus=self.places.ingest_cpu, name=f"ingest {job.source}", **options)
            ref = call.remote(self._source_refs[job.source], self.retries.unit_task(job))
        else:
            name = self.plan.stages[job.stage].name
            call = self._task.options(num_cpus=self.places.task_cpu, name=name, **options)
            ref = call.remote(self._stage_refs[job.stage], self.retries.task(job))
        self.flights[ref] = Flight(job)
        self.board.begin(job)

    def _give(self, actor: Actor, job: Job) -> None:
        ref = actor.handle.run.options(num_returns="streaming").remote(self.retries.task(job))
        actor.refs.append(ref)
        self.flights[ref] = Flight(job, actor)
        self.board.begin(job)

    def _serve_model(self, stage: int) -> None:
        """Shards for the stage's actors, and an actor more if they are behind and there is a place."""
        mine = [actor for actor in self.actors if actor.stage == stage]
        while free := [a for a in mine if a.ready and len(a.refs) < (1 if a.alone else PER_ACTOR)]:
            if (job := self.plan.take(stage)) is None:
                break
            alone = self.at_once[stage] > 1 and self.retries.suspected(job)
            if alone and not (free := [actor for actor in free if not actor.refs]):
                self.plan.requeue(job)
                break
            failed = self.retries.of(job).nodes
            actor = min(free, key=lambda actor: (actor.node in failed, len(actor.refs)))
            actor.alone = alone
            self._give(actor, job)
        backlog, ready = len(self.plan.ready[stage]), sum(actor.ready for actor in mine)
        if not backlog or len(mine) - ready >= max(1, ready):
            return
        places = self._places(stage)
        like = [s for s, device in enumerate(self.device) if device == self.device[stage]]
        kept = {s for s in like if self._wants_model(s)} - {stage, *(a.stage for a in self.actors)}
        room = sum(actor.stage in like for actor in self.actors) + len(kept) < places.count
        more = len(mine) < places.per_stage and backlog >= PER_ACTOR * len(mine)
        if not mine or (room and more):
            options: dict[str, Any] = {"num_cpus": places.cpu, "num_gpus": places.gpu}
            if not places.gpu:  # they ask for less than they take: not all on one node
                options["scheduling_strategy"] = "SPREAD"
            handle = self._actor.options(max_concurrency=self.at_once[stage], **options).remote(self._stage_refs[stage])
            actor = Actor(handle, stage, time.monotonic())
            actor.refs = [handle.place.remote(), handle.load.remote()]
            self.actors.append(actor)
            self.flights |= {ref: Flight(None, actor) for ref in actor.refs}

    def _places(self, stage: int) -> Actors:
        return self.places.models(self.device[stage] or "cpu")

    def _release_idle(self, now: float) -> None:
        """Give back the places of models that have nothing to do."""
        crowded = any(actor.node is None and now - actor.began > CROWDED_SECONDS for actor in self.actors)
        for actor in [actor for actor in self.actors if actor.ready and not actor.refs]:
            idle = now - actor.idle_since
            if self._finished(actor.stage) or idle > IDLE_SECONDS or (crowded and idle > CROWDED_SECONDS):
                self._dismiss(actor)

    def _wants_model(self, stage: int) -> bool:
        return bool(self.device[stage]) and bool(self.plan.targets[stage]) and not self._finished(stage)

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
        message: workers.Message
        try:
            message = ray.get(ref if flight.job is None else next(ref))
        except StopIteration:
            message = {"error": {"message": "the worker ended without an answer", "traceback": "", "request": False}}
        except ray.exceptions.RayError as error:  # the process or its node is gone
            self._gone(ref, flight, error)
            return
        if message.get("error", {}).get("request"):
            raise RequestError(message["error"]["message"])
        if "began" in message:
            flight.began, flight.node = time.monotonic(), message["began"]
        elif isinstance(flight.job, UnitJob):
            self._ingested(ref, flight, message)
        else:
            self._ended(ref, flight, message)

    def _ended(self, ref: Any, flight: Flight, message: workers.Message) -> None:
        """The answer of a stage, or of an actor that is loading."""
        del self.flights[ref]
        job, actor = flight.job, flight.actor
        if actor is not None:
            actor.refs.remove(ref)
            actor.idle_since = time.monotonic()
            if actor.refs:  # what hung until now was not what comes next
                self.flights[actor.refs[0]].began = actor.idle_since
            actor.node = message.get("placed", actor.node)
            actor.ready |= "placed" not in message
        if "error" in message and (job is None or message.get("load")):
            stage = actor.stage if actor is not None else job.stage  # type: ignore[union-attr]
            raise RequestError(
                f"stage {self.plan.stages[stage].name}: it cannot be loaded: {message['error']['message']}"
            )
        if job is None and actor is not None and "placed" not in message:
            self.lost_actors[actor.stage] = 0  # it loads: what died before died by chance
        if not isinstance(job, Job):
            return
        for column in [*message["made"], *message["there"]]:
            self.plan.committed(job.source, job.shard, column)
        self.board.made(job, message["made"])
        if "error" in message:
            self._decided(job, self.retries.raised(job, message["error"], flight.node))
        elif self.retries.of(job).search is not None:
            self._decided(job, self.retries.survived(job))
        else:
            self._tell_aside(job)
            self.plan.release(job)

    def _ingested(self, ref: Any, flight: Flight, message: workers.Message) -> None:
        """A message of a unit that is being read: a shard is committed, the whole is, or it failed."""
        job = flight.job
        assert isinstance(job, UnitJob)
        if "error" in message:
            del self.flights[ref]
            self._decided(job, self.retries.raised(job, message["error"], flight.node))
        elif "unit" in message:
            del self.flights[ref]
            for shard in message["shards"]:
                self.plan.committed(job.source, shard, IMAGES)
            self.plan.unit_committed(job.source, job.unit)
            self.retries.done(job)
            self.board.unit_read()
        elif "shard" in message and self.plan.committed(job.source, message["shard"], IMAGES):
            self.board.ingested(message)

    def _decided(self, job: Job | UnitJob, seconds: float | None) -> None:
        """Try a job again in so many seconds; None: set it aside."""
        if seconds is not None:
            heapq.heappush(self.delayed, (time.monotonic() + seconds, next(self._count), job))
            return
        history = self.retries.done(job)
        stage = "ingest" if isinstance(job, UnitJob) else self.plan.stages[job.stage].name
        name = job.unit if isinstance(job, UnitJob) else job.shard
        tries, message = max(history.attempts, history.lost), history.error["message"]
        if history.error.get("full_disk_of"):  # all that is left would fail like this one
            raise RequestError(
                f"node {history.error['full_disk_of']}: {message} ({name} in {stage}, {tries} attempts). Make room "
                "there (the corpus, if a folder; resources.scratch, where downloads lie) and run the same command again"
            )
        for column in self.plan.set_aside(job):
            what = {"stage": stage, "attempts": tries, "message": message, "traceback": history.error["traceback"]}
            try:
                write_failure(self.corpus, column, job.source, name, **what)
            except (OSError, BaseError) as error:
                raise RequestError(
                    f"corpus {self.corpus.url}: it cannot be written ({first_line(error)}); {name} failed in {stage} "
                    f"before that: {message}. Make room, or mend the access, and run the same command again"
                ) from error
        self.board.say(f"{stage}: {name} is set aside after {tries} attempts: {message.splitlines()[0]}")

    def _tell_aside(self, job: Job) -> None:
        for row, reason in self.retries.done(job).aside.items():
            self.board.say(f"{self.plan.stages[job.stage].name}: {job.shard} row {row} is set aside: {reason}")

    def _gone(self, ref: Any, flight: Flight, error: Exception) -> None:
        """A process is gone. What it was working on is blamed; what only waited there is handed out again."""
        del self.flights[ref]
        job, actor = flight.job, flight.actor
        node = flight.node if actor is None else actor.node
        first = actor is None or actor.refs[0] == ref
        if actor in self.actors and actor is not None:
            self._dismiss(actor)
        gone = isinstance(error, ray.exceptions.NodeDiedError) or (node is not None and not cluster.is_alive(node))
        lost = gone or isinstance(error, ray.exceptions.OutOfMemoryError)
        told = {"message": f"the process that worked on it died: {first_line(error)}", "traceback": str(error)}
        if job is None:
            assert actor is not None
            if first and not gone:  # `place` and `load` are lost together, and count once
                self._could_not_load(actor.stage, error)
        elif isinstance(error, ray.exceptions.RayTaskError):  # raised not by a stage, but around it
            told["message"] = str(error.cause)
            self._decided(job, self.retries.raised(job, told, node))
        elif not first:
            self.plan.requeue(job)
        elif lost:
            self._decided(job, self.retries.lost(job, told, node))
        else:
            # what hung ends after the whole of it; the word that it had begun may have come late
            hung = flight.began is not None and time.monotonic() - flight.began >= self.stall_timeout / 2
            if hung:
                told["message"] = f"no sample was done within {self.stall_timeout:g} s, and the process was ended"
            self._decided(job, self.retries.died(job, "stall" if hung else "crash", told, node))

    def _could_not_load(self, stage: int, error: Exception) -> None:
        self.lost_actors[stage] += 1
        if isinstance(error, ray.exceptions.RayTaskError) or self.lost_actors[stage] >= self.retries.max_attempts:
            raise RequestError(
                f"stage {self.plan.stages[stage].name}: the process that loads its model died "
                f"{self.lost_actors[stage]} times: {error}"
            )

    def _report(self, last: bool = False) -> None:
        if self.board.due(last):
            running = [flight.job for flight in self.flights.values()]
            loading = {actor.stage for actor in self.actors if not actor.ready}
            holding = [actor.stage for actor in self.actors if actor.ready]
            self.board.show(self.plan, running, loading, holding)
