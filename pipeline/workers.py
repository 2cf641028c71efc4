"""What runs on the workers: the plain functions of sources and stages, given a place by Ray.

Only names and small dictionaries travel. What goes wrong comes back as a dictionary too, so that no exception of a
model's library has to survive pickling.
"""

import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from pipeline.corpus import Commit, Corpus, ShardRef, UnitCommit
from pipeline.errors import RequestError
from pipeline.records import commit_name
from pipeline.sources import Source
from pipeline.stages import Stage

Ingest = Callable[[Corpus, Source, str, Callable[[dict[str, Any]], None]], UnitCommit]

_stages: dict[str, Stage] = {}
_watched = threading.Lock()


def end_with_parent() -> None:
    """Make this process end within a tenth of a second when the one that started it is gone.

    After a SIGKILL of the driver Ray's workers live on for two seconds. What was served by the driver (the demo's
    images) is gone by then, and nobody should record that as the images' fault.
    """
    if not _watched.acquire(blocking=False):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def error_of(error: BaseException) -> dict[str, Any]:
    """An exception as a dictionary: what it says, the traceback, and whether it is the request that is wrong."""
    text = str(error).strip()
    return {
        "message": text if isinstance(error, RequestError) else f"{type(error).__name__}: {text}".rstrip(": "),
        "traceback": "".join(traceback.format_exception(error)),
        "request": isinstance(error, RequestError),
    }


def ingest(refs: list[Any], unit: str) -> Iterator[dict[str, Any]]:
    """Read a unit; yields what `ingest_unit` reports as it goes, and as the last one the unit or the error."""
    end_with_parent()
    (corpus, function), source = ray.get(refs)
    messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        try:
            record = function(corpus, source, unit, messages.put)
            messages.put({"unit": record.unit, "shards": record.shards})
        except Exception as error:
            messages.put({"error": error_of(error)})

    threading.Thread(target=read, daemon=True, name="ingest").start()
    while True:
        message = messages.get()
        yield message
        if "unit" in message or "error" in message:
            return


def run_stage(stage: Stage, corpus: Corpus, ref: ShardRef, columns: Sequence[str]) -> dict[str, Any]:
    """One shard of a stage: `{"made": {column: {in, out, failed, seconds}}}`, and `error` if it did not end well."""
    try:
        commits = stage.run(corpus, ref, columns)
        missing = set(columns) - {commit.column for commit in commits}
        if missing:
            raise RuntimeError(f"stage {stage.name} made no commit of {', '.join(sorted(missing))} for {ref.shard}")
    except Exception as error:
        there = [c for c in columns if corpus.store.exists(commit_name(c, ref.source, ref.shard, 0))]
        return {"made": {column: {} for column in there}, "error": error_of(error)}
    return {"made": {commit.column: summary_of(commit) for commit in commits}}


def summary_of(commit: Commit) -> dict[str, Any]:
    return {**commit.counts, "seconds": commit.timings["seconds"]}


def stage_task(refs: list[Any], ref: ShardRef, columns: Sequence[str]) -> dict[str, Any]:
    """`run_stage` as a task: a process keeps the stages that it has loaded."""
    end_with_parent()
    key = refs[1].hex()
    corpus = ray.get(refs[0])
    if key not in _stages:
        stage: Stage = ray.get(refs[1])
        try:
            stage.load()
        except Exception as error:
            return {"made": {}, "error": error_of(error), "load": True}
        _stages[key] = stage
    return run_stage(_stages[key], corpus, ref, columns)


class StageActor:
    """A stage that holds a model: loaded once, then one shard after the other."""

    def __init__(self, refs: list[Any]):
        end_with_parent()
        self._corpus, self._stage = ray.get(refs)

    def place(self) -> dict[str, Any]:
        """Answered as soon as the actor has its place."""
        return {"placed": True}

    def load(self) -> dict[str, Any]:
        """Load the models; `{"error": ...}` if that fails."""
        try:
            self._stage.load()
        except Exception as error:
            return {"error": error_of(error)}
        return {}

    def run(self, ref: ShardRef, columns: Sequence[str]) -> dict[str, Any]:
        return run_stage(self._stage, self._corpus, ref, columns)
