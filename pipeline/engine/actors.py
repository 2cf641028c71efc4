"""Keep the actors that hold a model: start one for a stage that is behind, dismiss the ones that are idle."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.engine import workers
from microdit.pipeline.engine.layout import ModelShare
from microdit.pipeline.stages.stage import Stage, Task

IDLE_SECONDS = 30.0  # without work for longer than this an actor gives its CPUs and GPU back
CROWDED_SECONDS = 10.0  # the same while an actor of another stage has waited as long for its own
PER_ACTOR = 2  # shards with an actor: one running, one waiting, or already decoding (`at_once` of a stage)


@dataclass(eq=False)
class Actor:
    """An actor of a stage, and the calls that it has been given."""

    handle: Any
    stage: int
    asked: float
    """Time at which Ray was asked for it."""
    node: str | None = None
    """The node on which Ray has started it."""
    ready: bool = False
    """It has loaded its model."""
    refs: list[Any] = field(default_factory=list)
    """Calls that have not ended, first in first out."""
    idle_since: float = 0.0
    alone: bool = False
    """Its shard may kill the process: no other one runs beside it, to be blamed or to hide whose fault it is."""

    def submit(self, task: Task) -> Any:
        """Give the actor a shard; return the reference of the call."""
        ref = self.handle.run.options(num_returns="streaming").remote(task)
        self.refs.append(ref)
        return ref

    def end_call(self, ref: Any) -> None:
        """Forget a call that has ended."""
        self.refs.remove(ref)
        self.idle_since = time.monotonic()

    def was_running(self, ref: Any) -> bool:
        """Return True of the call at the head of the queue; the others only waited."""
        return bool(self.refs[0] == ref)


class ActorPool:
    """The actors of a build, by stage.

    Args:
        stage_refs: by stage the objects in Ray that an actor is made from: the build's context and the stage.
        max_deaths: processes that may die while they load a stage's model.
    """

    def __init__(self, stages: Sequence[Stage], stage_refs: Sequence[list[Any]], max_deaths: int):
        self._stages, self._stage_refs, self._max_deaths = stages, stage_refs, max_deaths
        self._deaths = [0] * len(stages)  # while loading
        self._actors: list[Actor] = []
        self._remote: Any = ray.remote(max_restarts=0, max_task_retries=0)(workers.StageActor)

    def loading(self) -> set[int]:
        """Return the stages of which an actor is not ready yet."""
        return {actor.stage for actor in self._actors if not actor.ready}

    def holding(self) -> list[int]:
        """Return the stage of each actor that is ready."""
        return [actor.stage for actor in self._actors if actor.ready]

    def free(self, stage: int) -> list[Actor]:
        """Return the stage's actors that can be given a shard."""
        return [
            actor
            for actor in self._actors
            if actor.stage == stage and actor.ready and len(actor.refs) < (1 if actor.alone else PER_ACTOR)
        ]

    def choose(self, stage: int, failed_nodes: Collection[str], deadly: bool) -> Actor | None:
        """Return the actor to give a shard to: not on a node where it failed, if possible, and the least busy one.

        deadly: the shard may kill the process, so an actor that works on several at once must be idle, and stays alone
        with it. None if there is no such actor.
        """
        free = self.free(stage)
        alone = deadly and _shards_at_once(self._stages[stage]) > 1
        if alone:
            free = [actor for actor in free if not actor.refs]
        if not free:
            return None
        actor = min(free, key=lambda actor: (actor.node in failed_nodes, len(actor.refs)))
        actor.alone = alone
        return actor

    # -- starting ------------------------------------------------------------------------------------------------------

    def grow(self, stage: int, backlog: int, share: ModelShare, reserved: Callable[[], set[int]]) -> Actor | None:
        """Ask Ray for one more actor if the stage is behind and its share allows it.

        A stage's first actor is always asked for: what cannot start yet is the demand that an autoscaler sees.

        Args:
            backlog: shards of the stage that no actor has.
            share: the share of the stages of this kind.
            reserved: returns the stages of this kind that will need an actor; each keeps one of `share.count`.
        """
        mine = [actor for actor in self._actors if actor.stage == stage]
        ready = sum(actor.ready for actor in mine)
        if not backlog or len(mine) - ready >= max(1, ready):
            return None
        if mine and (len(mine) >= share.per_stage or backlog < PER_ACTOR * len(mine)):
            return None
        if mine and not self._has_room(stage, share, reserved()):
            return None
        return self._start(stage, share)

    def _has_room(self, stage: int, share: ModelShare, reserved: set[int]) -> bool:
        device = self._stages[stage].device
        like_this = sum(self._stages[actor.stage].device == device for actor in self._actors)
        without_actor = reserved - {stage, *(actor.stage for actor in self._actors)}
        return like_this + len(without_actor) < share.count

    def _start(self, stage: int, share: ModelShare) -> Actor:
        options: dict[str, Any] = {"num_cpus": share.cpu, "num_gpus": share.gpu}
        if not share.gpu:  # they ask for less than they take: not all on one node
            options["scheduling_strategy"] = "SPREAD"
        at_once = _shards_at_once(self._stages[stage])
        handle = self._remote.options(max_concurrency=at_once, **options).remote(self._stage_refs[stage])
        actor = Actor(handle, stage, time.monotonic(), refs=[handle.start.remote(), handle.load.remote()])
        self._actors.append(actor)
        return actor

    # -- loading and ending --------------------------------------------------------------------------------------------

    def loaded(self, actor: Actor) -> None:
        """Note that an actor is ready: processes that died while they loaded its stage died by chance."""
        actor.ready = True
        self._deaths[actor.stage] = 0

    def died_loading(self, actor: Actor, error: Exception) -> None:
        """Count a process that died while it loaded its model.

        Raises:
            RequestError: it was the last one that may.
        """
        stage = actor.stage
        self._deaths[stage] += 1
        if isinstance(error, ray.exceptions.RayTaskError) or self._deaths[stage] >= self._max_deaths:
            raise RequestError(
                f"stage {self._stages[stage].name}: the process that loads its model died "
                f"{self._deaths[stage]} times: {error}"
            )

    def release_idle(self, finished: Callable[[int], bool]) -> None:
        """Dismiss the actors that have nothing to do: at once those of a finished stage, later the others."""
        now = time.monotonic()
        crowded = any(actor.node is None and now - actor.asked > CROWDED_SECONDS for actor in self._actors)
        for actor in [actor for actor in self._actors if actor.ready and not actor.refs]:
            idle = now - actor.idle_since
            if finished(actor.stage) or idle > IDLE_SECONDS or (crowded and idle > CROWDED_SECONDS):
                self.dismiss(actor)

    def dismiss(self, actor: Actor) -> None:
        """End an actor's process, unless that was done before."""
        if actor in self._actors:
            self._actors.remove(actor)
            ray.kill(actor.handle)


def _shards_at_once(stage: Stage) -> int:
    """Return how many shards a process of the stage works on at once, in threads."""
    return getattr(stage, "at_once", 1)
