"""The driver of a build: submit the plan's jobs, most downstream stage first, wait, and take back their results.

It keeps no state that matters: the plan comes from listings, and what has become ready from the workers' messages. Kill
it and start it again, and the listing says where to go on.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.retry_units import is_retry
from microdit.pipeline.engine import messages, workers
from microdit.pipeline.engine.actors import Actor, ActorPool
from microdit.pipeline.engine.board import Board
from microdit.pipeline.engine.cluster import ClusterView
from microdit.pipeline.engine.deaths import explain_death
from microdit.pipeline.engine.failing_sources import FailingSources
from microdit.pipeline.engine.give_up import give_up, stage_name
from microdit.pipeline.engine.gpus import GpuNodes
from microdit.pipeline.engine.holders import SourceModels, stage_holder
from microdit.pipeline.engine.plan import Job, Plan, UnitJob
from microdit.pipeline.engine.retries import DelayedJobs, Retries
from microdit.pipeline.sources.source import Source

POLL_SECONDS = 0.2  # between two rounds of the loop if no message comes
GRACE_SECONDS = 15.0  # for the shards in progress when a signal comes


@dataclass
class Call:
    """A call that was submitted and has not ended: of a job, or (None) of an actor's `start` and `load`.

    `began` and `node`: when and where a worker began it, once that is known.
    """

    job: Job | UnitJob | None
    actor: Actor | None = None
    began: float | None = None
    node: str | None = None


class Driver:
    """One build's driver: `run` ends when nothing can be done any more."""

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Source],
        ingest: workers.Ingest,
        retries: Retries,
        context: workers.BuildContext,
        resources: Mapping[str, float],
        board: Board,
        failing: FailingSources,
    ):
        self.plan, self.retries, self.board, self._failing = plan, retries, board, failing
        self.stop: int | None = None
        self._corpus, self._stall_timeout = context.corpus, context.stall_timeout
        self._order = plan.downstream_first()
        self._upstream = [plan.upstream(stage) for stage in range(len(plan.stages))]
        self._calls: dict[Any, Call] = {}
        self._delayed = DelayedJobs()
        self._ingest: Any = ray.remote(max_retries=0, num_returns="streaming")(workers.ingest)
        self._task: Any = ray.remote(max_retries=0, num_returns="streaming")(workers.stage_task)
        context_ref, ingest_ref = ray.put(context), ray.put(ingest)
        self._source_refs = {source.name: [context_ref, ingest_ref, ray.put(source)] for source in sources}
        self._models = SourceModels(sources, len(plan.stages))
        self._holders = [stage_holder(stage, [context_ref, ray.put(stage)]) for stage in plan.stages]
        self._holders += self._models.holders(self._source_refs)
        self._devices = [holder.device for holder in self._holders]
        models = [self._devices[holder] for holder in range(len(self._holders)) if self._has_work(holder)]
        self._wants_gpus = "gpu" in models
        self._cluster = ClusterView(models.count("gpu"), models.count("cpu"), resources)
        self._actors = ActorPool(self._holders, retries.max_attempts)

    def ask_to_stop(self, signum: int) -> None:
        """End `run` soon, because this signal came."""
        self.stop = signum

    @property
    def gpus(self) -> GpuNodes | None:
        """The GPUs that models worked on, and those left out; None if no model wanted one."""
        return self._cluster.gpus if self._wants_gpus else None

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Carry the plan out; return early, with `stop` set, after a signal."""
        while self.stop is None:
            self._cluster.refresh()
            self._submit()
            if not self._calls and not self._delayed and not self.plan.units:  # a source may be paused
                break
            self._wait()
            self._report()
        else:
            self._drain()
        self._report(last=True)

    def _wait(self) -> None:
        """Wait for a message, and take back every one that has come."""
        if not self._calls:
            time.sleep(POLL_SECONDS)
            return
        done, rest = ray.wait(list(self._calls), num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        for ref in done:
            if ref in self._calls:
                self._take_back(ref, self._calls[ref])

    def _drain(self) -> None:
        """Let the shards in progress end after a signal; drop the units, whose committed shards stay."""
        self._calls = {ref: call for ref, call in self._calls.items() if isinstance(call.job, Job)}
        until = time.monotonic() + GRACE_SECONDS
        if self._calls:
            self.board.note(f"stopping: {len(self._calls)} shards in flight get {GRACE_SECONDS:.0f} s to end")
        while self._calls and time.monotonic() < until:
            self._wait()
            self._report()

    def _report(self, last: bool = False) -> None:
        if self.board.due(last):
            running = [call.job for call in self._calls.values()]
            self.board.show(self.plan, running, self._actors.loading(), self._actors.holding())

    # -- submit --------------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Submit as much as the layout allows."""
        for due in self._delayed.take_due():
            self.plan.requeue(due)
        for stage in self._order:
            if self._devices[stage]:
                self._submit_to_actors(stage)
            else:
                while self._running_tasks() < self._cluster.layout.tasks and (job := self.plan.take(stage)):
                    self._submit_task(job)
        for holder in range(len(self.plan.stages), len(self._holders)):
            self._submit_to_actors(holder)
        while self._running_ingests() < self._cluster.layout.ingests and (unit := self._take_unit(None)):
            self._submit_task(unit)
        self._actors.release_idle(self._is_finished)

    def _running_tasks(self) -> int:
        return sum(isinstance(call.job, Job) and call.actor is None for call in self._calls.values())

    def _running_ingests(self) -> int:
        return sum(isinstance(call.job, UnitJob) and call.actor is None for call in self._calls.values())

    def _take_unit(self, holder: int | None) -> UnitJob | None:
        """Take the next unit that needs this model, or (None) none."""
        may_read: dict[str, bool] = {}

        def may_take(unit: UnitJob) -> bool:
            if self._models.holder_of(unit) != holder:
                return False
            if unit.source not in may_read:
                may_read[unit.source] = self._may_read(unit.source)
            return may_read[unit.source]

        return self.plan.take_unit(may_take)

    def _may_read(self, source: str) -> bool:
        jobs = [call.job for call in self._calls.values()]
        return self._failing.may_read(source, sum(isinstance(job, UnitJob) and job.source == source for job in jobs))

    def _submit_task(self, job: Job | UnitJob) -> None:
        """Submit a unit, or a shard of a stage without a model, preferably not to a node where it failed."""
        elsewhere = [node for node in self._cluster.nodes if node not in self.retries.of(job).nodes]
        options: dict[str, Any] = {"name": stage_name(self.plan, job)}
        if elsewhere and len(elsewhere) < len(self._cluster.nodes):
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(random.choice(elsewhere), soft=True)
        if isinstance(job, UnitJob):
            options["name"] += f" {job.source}"
            call = self._ingest.options(num_cpus=self._cluster.layout.ingest_cpu, **options)
            ref = call.remote(self._source_refs[job.source], self.retries.unit_task(job))
        else:
            call = self._task.options(num_cpus=self._cluster.layout.task_cpu, **options)
            ref = call.remote(self._holders[job.stage].refs, self.retries.task(job))
        self._calls[ref] = Call(job)
        self.board.begin(job)

    def _submit_to_actors(self, holder: int) -> None:
        """Give a stage's shards or a source's units to the actors with the model; start one more if they are behind."""
        is_stage = holder < len(self.plan.stages)
        while self._actors.free(holder) and (job := self.plan.take(holder) if is_stage else self._take_unit(holder)):
            actor = self._actors.choose(holder, self.retries.of(job).nodes, self.retries.suspected(job))
            if actor is None:
                self.plan.requeue(job)
                break
            task = self.retries.unit_task(job) if isinstance(job, UnitJob) else self.retries.task(job)
            self._calls[actor.submit(task)] = Call(job, actor)
            self.board.begin(job)
        share = self._cluster.layout.models(self._devices[holder] or "cpu")
        backlog = len(self.plan.ready[holder]) if is_stage else self._models.waiting(self.plan, holder)
        if fresh := self._actors.grow(holder, backlog, share, lambda: self._with_model(holder)):
            self._calls |= {ref: Call(None, fresh) for ref in fresh.refs}

    def _with_model(self, like: int) -> set[int]:
        """Return the holders on the same device as this one that have, or will have, work for a model."""
        same = [holder for holder, device in enumerate(self._devices) if device == self._devices[like]]
        return {holder for holder in same if self._has_work(holder) and not self._is_finished(holder)}

    def _has_work(self, holder: int) -> bool:
        """Return True if the plan asks for what a holder makes."""
        if holder < len(self.plan.stages):
            return bool(self.plan.targets[holder])
        return self._models.waiting(self.plan, holder) > 0

    def _is_finished(self, holder: int) -> bool:
        """Return True if no more work can come for a stage, or for a source's model."""
        jobs = [call.job for call in self._calls.values()] + list(self._delayed)
        if holder >= len(self.plan.stages):
            units = [*self.plan.units, *(job for job in jobs if isinstance(job, UnitJob))]
            return all(self._models.holder_of(unit) != holder for unit in units)
        if self.plan.units or any(isinstance(job, UnitJob) for job in jobs):
            return False
        busy = {job.stage for job in jobs if isinstance(job, Job)}
        return all(s not in busy and not self.plan.ready[s] for s in {holder, *self._upstream[holder]})

    # -- take back -----------------------------------------------------------------------------------------------------

    def _take_back(self, ref: Any, call: Call) -> None:
        """Take the next message of a call."""
        try:
            message: messages.Message = ray.get(ref if call.job is None else next(ref))
        except StopIteration:
            error = messages.ErrorReport("the worker ended without an answer", "")
            is_unit = isinstance(call.job, UnitJob)
            message = messages.UnitFailed(error) if is_unit else messages.ShardEnded({}, error=error)
        except ray.exceptions.RayError as error:  # the process or its node is gone
            self._process_gone(ref, call, error)
            return
        match message:
            case messages.Began(node):
                call.began, call.node = time.monotonic(), node
            case messages.ShardIngested() | messages.UnitIngested() | messages.UnitFailed():
                self._take_ingest(ref, call, message)
            case messages.ShardEnded():
                self._take_shard(ref, call, message)
            case messages.GpuUnusable():
                self._leave_out_gpus(call, message)
            case messages.ActorStarted() | messages.ActorLoaded() | messages.LoadFailed():
                self._take_load(ref, call, message)
            case _:
                assert_never(message)

    def _take_ingest(self, ref: Any, call: Call, message: messages.IngestMessage) -> None:
        job = call.job
        assert isinstance(job, UnitJob)
        match message:
            case messages.ShardIngested(shard, work):
                if self.plan.committed(job.source, shard, IMAGES):
                    self.board.ingested(work)
                    self._look_at_failures(job, work)
                if work.unrepaired:
                    self.board.note(
                        f"ingest: {shard}: {work.unrepaired} damaged rows could not be had again; --repair tries again"
                    )
            case messages.UnitIngested(shards):
                self._end_call(ref, call)
                for shard in shards:
                    self.plan.committed(job.source, shard, IMAGES)
                self.plan.unit_committed(job.source, job.unit)
                self.retries.done(job)
                self.board.unit_read()
            case messages.UnitFailed(error):
                error.raise_if_request()
                self._end_call(ref, call)
                self._retry_or_give_up(job, self.retries.raised(job, error, call.node))
            case _:
                assert_never(message)

    def _look_at_failures(self, job: UnitJob, work: messages.ShardWork) -> None:
        """Pause or leave a source that fails wholesale; a repair and a retry unit read what has failed before."""
        if job.redo is not None or is_retry(job.unit):
            return
        if note := self._failing.add(job.source, work):
            self.board.note(note)
        if job.source in self.left:
            self.plan.leave(job.source)

    @property
    def left(self) -> list[str]:
        """The sources of which units are left unread, because nearly all of their inputs failed."""
        return self._failing.left

    def _take_shard(self, ref: Any, call: Call, message: messages.ShardEnded) -> None:
        job, error = call.job, message.error
        assert isinstance(job, Job)
        if error is not None:
            error.raise_if_request()
        self.retries.answered(job, error)
        self._end_call(ref, call)
        for column in (*message.written, *message.existing):
            self.plan.committed(job.source, job.shard, column)
        for column in message.unchanged:
            self.plan.unchanged(job.source, job.shard, column)
            self.board.note(f"{stage_name(self.plan, job)}: {job.shard}: the rows that were made again failed again")
        self.board.written(job, message.written)
        if error is not None:
            self._retry_or_give_up(job, self.retries.raised(job, error, call.node))
        elif self.retries.of(job).search is not None:
            self._retry_or_give_up(job, self.retries.survived(job))
        else:
            for row, reason in self.retries.done(job).aside.items():
                self.board.note(f"{stage_name(self.plan, job)}: {job.shard} row {row} is set aside: {reason}")
            self.plan.release(job)

    def _leave_out_gpus(self, call: Call, message: messages.GpuUnusable) -> None:
        """Go on without the GPUs of a node, if there are others."""
        assert call.actor is not None
        if self._cluster.leave_out_gpus(message.node, message.reason):
            self.board.note(f"{message.reason}; the node's GPUs are left out")
        self._calls = {ref: other for ref, other in self._calls.items() if other.actor is not call.actor}
        self._actors.dismiss(call.actor)

    def _take_load(
        self, ref: Any, call: Call, message: messages.ActorStarted | messages.ActorLoaded | messages.LoadFailed
    ) -> None:
        if isinstance(message, messages.LoadFailed):
            message.error.raise_if_request()
            if call.actor is not None:
                name = self._holders[call.actor.holder].name
            else:
                assert isinstance(call.job, Job)
                name = self._holders[call.job.stage].name
            raise RequestError(f"{name}: it cannot be loaded: {message.error.message}")
        assert call.actor is not None
        self._end_call(ref, call)
        if isinstance(message, messages.ActorStarted):
            call.actor.node = message.node
        else:
            self._actors.loaded(call.actor)
            self._cluster.gpus.add(message.node, message.gpus)

    def _end_call(self, ref: Any, call: Call) -> None:
        """Forget a call that has ended; its actor turns to the next one."""
        del self._calls[ref]
        if call.actor is not None:
            call.actor.end_call(ref)
            following = self._calls.get(call.actor.refs[0]) if call.actor.refs else None
            if following is not None:  # it has not been running, nor hanging, until now
                following.began = call.actor.idle_since

    def _process_gone(self, ref: Any, call: Call, error: ray.exceptions.RayError) -> None:
        """Blame the job that a process was working on when it ended; submit those again that only waited there."""
        del self._calls[ref]
        job, actor = call.job, call.actor
        node = call.node if actor is None else actor.node
        was_running = actor is None or actor.was_running(ref)
        if actor is not None:
            self._actors.dismiss(actor)
        death = explain_death(error, node, call.began, self._stall_timeout)
        if job is None:
            assert actor is not None
            if was_running and not death.node_gone:  # `start` and `load` are lost together, and count once
                self._actors.died_loading(actor, error)
        elif death.cause == "raised":
            self._retry_or_give_up(job, self.retries.raised(job, death.error, node))
        elif not was_running:
            self.plan.requeue(job)
        elif death.cause == "lost":
            self._retry_or_give_up(job, self.retries.lost(job, death.error, node))
        else:
            self._retry_or_give_up(job, self.retries.died(job, death.cause, death.error, node))

    def _retry_or_give_up(self, job: Job | UnitJob, seconds: float | None) -> None:
        """Submit a job again after so many seconds; None: give it up."""
        while self.retries.news:
            self.board.note(self.retries.news.pop())
        if seconds is not None:
            self._delayed.add(job, seconds)
        else:
            self.board.note(give_up(self._corpus, self.plan, job, self.retries.done(job)))
