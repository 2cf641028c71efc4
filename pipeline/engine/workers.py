"""What runs on the workers: the plain functions of sources and stages, given a place by Ray.

Only names and small dictionaries travel. Every call is a stream of messages: first that it has begun and where, at the
end what came of it. What goes wrong comes back as a message too, so that no exception of a model's library has to
survive pickling.
"""

import errno
import queue
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray

from microdit.pipeline.base.errors import DamagedError, RequestError
from microdit.pipeline.base.liveness import end_with_parent, watched
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import commit_name
from microdit.pipeline.corpus.records import Commit, UnitCommit
from microdit.pipeline.sources.source import Source
from microdit.pipeline.stages.stage import Stage, Task, UnitTask

Message = dict[str, Any]
Ingest = Callable[[Corpus, Source, UnitTask, Callable[[Message], None]], UnitCommit]
_stages: dict[str, Stage] = {}
_seen: set[str] = set()


@dataclass(frozen=True)
class Shared:
    """What all calls of a build need. `probe` is an object of the corpus that every node must see, if there is one."""

    corpus: Corpus
    probe: str | None
    stall_timeout: float


def error_of(error: BaseException) -> Message:
    """An exception as a dictionary: what it says, the traceback, and whether the request is wrong or a disk full."""
    text = str(error).strip()
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return {
        "message": text if isinstance(error, RequestError) else f"{type(error).__name__}: {text}".rstrip(": "),
        "traceback": "".join(traceback.format_exception(error)),
        "request": isinstance(error, RequestError) and not isinstance(error, DamagedError),
        "full_disk_of": socket.gethostname() if full else None,
    }


def look(shared: Shared) -> None:
    """Make sure that this node sees the folder in which the corpus is.

    Raises:
        RequestError: it does not.
    """
    if shared.probe is None or shared.probe in _seen:
        return
    if not shared.corpus.store.exists(shared.probe):
        raise RequestError(
            f"corpus {shared.corpus.url}: node {socket.gethostname()} does not see this folder as the others do. "
            "A folder serves one machine, or a mount that all nodes share: "
            "mount it on every node, or put the corpus into a bucket with --corpus s3://bucket/prefix"
        )
    _seen.add(shared.probe)


def look_from_here(refs: list[Any]) -> Message:
    """`look` as a task."""
    try:
        look(ray.get(refs[0]))
    except RequestError as error:
        return {"error": error_of(error)}
    return {}


def node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def ingest(refs: list[Any], task: UnitTask) -> Iterator[Message]:
    """Read a unit; yields what `ingest_unit` reports as it goes, and as the last one the unit or the error."""
    end_with_parent()
    yield {"began": node()}
    shared, function, source = (ray.get(ref) for ref in refs)
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def read() -> None:
        try:
            look(shared)
            with watched(shared.stall_timeout):
                record = function(shared.corpus, source, task, messages.put)
            messages.put({"unit": record.unit, "shards": record.shards})
        except Exception as error:
            messages.put({"error": error_of(error)})

    threading.Thread(target=read, daemon=True, name="ingest").start()
    while True:
        message = messages.get()
        yield message
        if "unit" in message or "error" in message:
            return


def run_stage(stage: Stage, corpus: Corpus, task: Task) -> Message:
    """One shard of a stage. `made`: what was written, by column; `there`: the columns that others had written.

    If it did not end well there is an `error` too.
    """
    left = dict(task.columns)
    made: dict[str, Message] = {}
    try:
        if task.rows is None:  # another build may have made it meanwhile
            left = {column: generation for column, generation in left.items() if not _there(corpus, task, column)}
        for commit in stage.run(corpus, replace(task, columns=left)) if left else ():
            del left[commit.column]
            if commit.ours:
                made[commit.column] = summary_of(commit)
        if left and task.rows is None:
            raise RuntimeError(f"stage {stage.name} made no commit of {', '.join(sorted(left))} for {task.ref.shard}")
    except Exception as error:
        there = [column for column in task.columns if _there(corpus, task, column)]
        return {"made": made, "there": there, "error": error_of(error)}
    return {"made": made, "there": [c for c in task.columns if c not in made] if task.rows is None else []}


def _there(corpus: Corpus, task: Task, column: str) -> bool:
    return corpus.store.exists(commit_name(column, task.ref.source, task.ref.shard, task.columns[column]))


def summary_of(commit: Commit) -> Message:
    return {**commit.counts, **commit.timings, "bytes": commit.size}


def stage_task(refs: list[Any], task: Task) -> Iterator[Message]:
    """`run_stage` as a task: a process keeps the stages that it has loaded."""
    end_with_parent()
    yield {"began": node()}
    key = refs[1].hex()
    shared = ray.get(refs[0])
    if key not in _stages:
        stage: Stage = ray.get(refs[1])
        try:
            look(shared)
            stage.load()
        except Exception as error:
            yield {"made": {}, "there": [], "error": error_of(error), "load": True}
            return
        _stages[key] = stage
    with watched(shared.stall_timeout):
        message = run_stage(_stages[key], shared.corpus, task)
    yield message


class StageActor:
    """A stage that holds a model: loaded once, then one shard after the other; or two at once, in threads."""

    def __init__(self, refs: list[Any]):
        end_with_parent()
        self._shared, self._stage = (ray.get(ref) for ref in refs)

    def place(self) -> Message:
        """Answered as soon as the actor has its place: which node."""
        return {"placed": node()}

    def load(self) -> Message:
        """Load the models; `{"error": ...}` if that fails."""
        try:
            look(self._shared)
            self._stage.load()
        except Exception as error:
            return {"error": error_of(error)}
        return {}

    def run(self, task: Task) -> Iterator[Message]:
        yield {"began": node()}
        with watched(self._shared.stall_timeout):
            message = run_stage(self._stage, self._shared.corpus, task)
        yield message
