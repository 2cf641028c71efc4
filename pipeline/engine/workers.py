"""The calls that run on the workers: the plain functions of sources and stages, as tasks and actors of Ray.

Only names and small records travel. Every call is a stream of messages: first that it has begun and on which node, at
the end its result. An error comes back as a message too.
"""

import errno
import queue
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from microdit.pipeline.base.errors import (
    CredentialsExpired,
    DamagedError,
    RequestError,
    ServerRejects,
    UnreadableError,
    first_line,
)
from microdit.pipeline.base.liveness import end_with_parent, watched
from microdit.pipeline.base.versions import differences, versions
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import commit_name
from microdit.pipeline.corpus.records import Commit, UnitCommit
from microdit.pipeline.engine.messages import (
    ActorLoaded,
    ActorStarted,
    Began,
    ErrorReport,
    GpuUnusable,
    IngestMessage,
    LoadFailed,
    LoadMessage,
    ShardEnded,
    ShardIngested,
    ShardWork,
    UnitFailed,
    UnitIngested,
)
from microdit.pipeline.sources.source import Source
from microdit.pipeline.stages.stage import Stage, Task, UnitTask

Ingest = Callable[[Corpus, Source, UnitTask, Callable[[Commit], None]], UnitCommit]
"""`ingest_unit` of one configuration; the last argument is called with the commit of each shard that it wrote."""

_stages: dict[str, Stage] = {}  # loaded by this process, by the id of their object in Ray
_seen_probes: set[str] = set()


@dataclass(frozen=True)
class BuildContext:
    """Context that every call of a build needs."""

    corpus: Corpus
    probe: str
    """An object of the corpus that every node must see."""
    stall_timeout: float
    """Seconds without headway after which a worker ends itself."""
    versions: dict[str, str] = field(default_factory=versions)
    """Of the driver's software: all nodes must have the same."""


def error_report(error: BaseException) -> ErrorReport:
    """Describe an exception, and whether the request is wrong or a disk full."""
    text = str(error).strip()
    hopeless = isinstance(error, CredentialsExpired) and not error.may_come
    is_plain = isinstance(error, RequestError | CredentialsExpired)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ErrorReport(
        message=text if is_plain and text else f"{type(error).__name__}: {text}".rstrip(": "),
        traceback="".join(traceback.format_exception(error)),
        is_request=hopeless
        or (isinstance(error, RequestError) and not isinstance(error, DamagedError | UnreadableError)),
        is_final=isinstance(error, UnreadableError),
        full_disk_of=socket.gethostname() if full else None,
        server_rejects=isinstance(error, ServerRejects),
        credentials_expired=isinstance(error, CredentialsExpired) and error.may_come,
    )


def check_fits(context: BuildContext) -> None:
    """Make sure that this node has the driver's software, and sees the folder in which the corpus is.

    Raises:
        RequestError: it does not.
    """
    if context.probe in _seen_probes:
        return
    if differ := differences(context.versions, versions()):
        raise RequestError(
            f"node {socket.gethostname()} has other software than the build's driver: {'; '.join(differ)}. Its samples "
            "would mix with others under one fingerprint: install the same on all nodes, and run the same command again"
        )
    if context.corpus.store.root is not None and not context.corpus.store.exists(context.probe):
        raise RequestError(
            f"corpus {context.corpus.url}: node {socket.gethostname()} does not see this folder as the others do. "
            "A folder serves one machine, or a mount that all nodes share: "
            "mount it on every node, or put the corpus into a bucket with --corpus s3://bucket/prefix"
        )
    _seen_probes.add(context.probe)


def check_node(refs: list[Any]) -> ErrorReport | None:
    """Run `check_fits` as a task; refs: the context."""
    try:
        check_fits(ray.get(refs[0]))
    except RequestError as error:
        return error_report(error)
    return None


def gpu_fault(gpus: Sequence[str]) -> str | None:
    """Say why torch cannot use the GPU that Ray gave this process, None if it can.

    On a CPU instead a model would be a hundred times slower.
    """
    if not gpus:
        return None
    import torch

    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError, OSError) as error:  # the second of a build of torch without CUDA
        return (
            f"node {socket.gethostname()} has GPU {', '.join(gpus)} as Ray says, and torch {torch.__version__} cannot "
            f"use it: {first_line(error)}"
        )
    return None


def node_id() -> str:
    """Return Ray's id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def ingest(refs: list[Any], task: UnitTask) -> Iterator[Began | IngestMessage]:
    """Read a unit: yield a message for each shard that is written, and a last one for the unit or the error.

    refs: the context, the `Ingest` function and the source.
    """
    end_with_parent()
    yield Began(node_id())
    context, function, source = (ray.get(ref) for ref in refs)
    messages: queue.SimpleQueue[IngestMessage] = queue.SimpleQueue()

    def report(commit: Commit) -> None:
        messages.put(ShardIngested(commit.shard, ShardWork.of(commit)))

    def read() -> None:
        try:
            check_fits(context)
            with watched(context.stall_timeout):
                record = function(context.corpus, source, task, report)
            messages.put(UnitIngested(tuple(record.shards)))
        except Exception as error:
            messages.put(UnitFailed(error_report(error)))

    threading.Thread(target=read, daemon=True, name="ingest").start()
    while True:
        message = messages.get()
        yield message
        if isinstance(message, UnitIngested | UnitFailed):
            return


def run_stage(stage: Stage, corpus: Corpus, task: Task) -> ShardEnded:
    """Run a stage on one shard, for the columns that no other build has committed meanwhile."""
    left = dict(task.columns)
    written: dict[str, ShardWork] = {}
    try:
        if task.rows is None:
            left = {column: number for column, number in left.items() if not _is_committed(corpus, task, column)}
        for commit in stage.run(corpus, replace(task, columns=left)) if left else ():
            del left[commit.column]
            if commit.ours:
                written[commit.column] = ShardWork.of(commit)
        unchanged = tuple(column for column in left if column in task.again)
        if len(left) > len(unchanged) and task.rows is None:
            raise RuntimeError(f"stage {stage.name} made no commit of {', '.join(sorted(left))} for {task.ref.shard}")
    except CredentialsExpired as error:  # nothing can be looked up
        return ShardEnded(written, (), error_report(error))
    except Exception as error:
        existing = tuple(column for column in task.columns if _is_committed(corpus, task, column))
        return ShardEnded(written, existing, error_report(error))
    if task.rows is not None:
        return ShardEnded(written)
    existing = tuple(c for c in task.columns if c not in written and c not in unchanged)
    return ShardEnded(written, existing, unchanged=unchanged)


def _is_committed(corpus: Corpus, task: Task, column: str) -> bool:
    return corpus.store.exists(commit_name(column, task.ref.source, task.ref.shard, task.columns[column]))


def stage_task(refs: list[Any], task: Task) -> Iterator[Began | ShardEnded | LoadFailed]:
    """Run a stage on one shard as a task. A process keeps the stages that it has loaded.

    refs: the context and the stage.
    """
    end_with_parent()
    yield Began(node_id())
    key = refs[1].hex()
    context = ray.get(refs[0])
    if key not in _stages:
        stage: Stage = ray.get(refs[1])
        try:
            check_fits(context)
            stage.load()
        except Exception as error:
            yield LoadFailed(error_report(error))
            return
        _stages[key] = stage
    with watched(context.stall_timeout):
        message = run_stage(_stages[key], context.corpus, task)
    yield message


class StageActor:
    """A stage that holds a model: loaded once, then one shard after the other, or two at once in threads.

    refs: the context and the stage.
    """

    def __init__(self, refs: list[Any]):
        end_with_parent()
        self._context, self._stage = (ray.get(ref) for ref in refs)

    def start(self) -> LoadMessage:
        """Answer as soon as Ray has started the actor, with its node."""
        return ActorStarted(node_id())

    def load(self) -> LoadMessage:
        """Load the models."""
        try:
            check_fits(self._context)
            gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
            if (fault := gpu_fault(gpus)) is not None:
                return GpuUnusable(node_id(), fault)
            self._stage.load()
        except Exception as error:
            return LoadFailed(error_report(error))
        return ActorLoaded(node_id(), tuple(gpus))

    def run(self, task: Task) -> Iterator[Began | ShardEnded]:
        """Run the stage on one shard."""
        yield Began(node_id())
        with watched(self._context.stall_timeout):
            message = run_stage(self._stage, self._context.corpus, task)
        yield message
