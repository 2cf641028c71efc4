"""Plain sources and stages to try the engine with: no image, no model, but real commits."""

import errno
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microdit.pipeline.corpus.attempt import commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import commit_name, shard_name, unit_name
from microdit.pipeline.corpus.records import Commit, ShardRef, UnitCommit
from microdit.pipeline.corpus.rows import Row, latest, read_lines
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.rows import Output, open_shard
from microdit.pipeline.stages.stage import ColumnSpec, Task, UnitTask
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS, write_images

ROWS = 3  # inputs of a shard; row 2 fails at ingest


@dataclass
class Pictures:
    """A source of `count` units, each of `shards` shards."""

    name: str = "pictures"
    terms: str = "made for a test"
    count: int = 3
    shards: int = 2
    entered: Path | None = None
    """A folder that gets a file while the source is running."""

    def stage(self) -> dict[str, Any]:
        return {"adapter": "pictures", "count": self.count}

    def units(self) -> list[str]:
        return [unit_name(self.name, number) for number in range(self.count)]

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Iterator[Input]:
        raise NotImplementedError  # `ingest` below makes the images itself

    @contextmanager
    def running(self, corpus: Corpus, say: Callable[[str], None]) -> Iterator[None]:
        if self.entered is not None:
            (self.entered / "running").touch()
        yield
        if self.entered is not None:
            (self.entered / "running").unlink()


def ingest(corpus: Corpus, source: Pictures, task: UnitTask, report: Callable[[Commit], None]) -> UnitCommit:
    """Write a unit's shards that are not there; the unit `...-000001` of a source named `broken` cannot be read."""
    unit, redo = task.unit, task.redo or {}
    if source.name == "broken" and unit.endswith("1"):
        raise OSError(f"{unit}: the disk is on fire")
    if source.entered is not None:
        assert (source.entered / "running").exists()
    names = [shard_name(unit, number) for number in range(source.shards)]
    for name in names:
        generation = redo.get(name, 0)
        if not corpus.store.exists(commit_name("images", source.name, name, generation)):
            ref = ShardRef(source=source.name, unit=unit, shard=name)
            commit = write_images(corpus, ref, rows=ROWS, generation=generation)
            if commit.ours:
                report(commit)
    return commit_unit(corpus, source.name, unit, ROWS * source.shards, names, task.generation)


@dataclass
class Words:
    """Writes captions columns from other columns; what it is asked to do wrong, it does wrong."""

    name: str
    columns: dict[str, ColumnSpec]
    device: str | None = None
    seconds: float = 0.0
    broken: tuple[str, ...] = ()
    """Shards on which it raises,"""
    full: tuple[str, ...] = ()
    """and on which there is no room on the disk."""
    deadly: tuple[str, ...] = ()
    """Shards on which the process dies."""
    crashes: tuple[tuple[str, int], ...] = ()
    """Shards and rows on which the process dies of a signal,"""
    hangs: tuple[tuple[str, int], ...] = ()
    """and on which it sleeps for an hour."""
    heals: Path | None = None
    """A file; when it is there, nothing is broken any more."""
    loads: Path | None = None
    """A folder that gets a file for every time that it is loaded: `<stage>-<process>-<its parent>-<random>`,"""
    runs: Path | None = None
    """and one for every shard that is begun: `<shard>-<process>-<its parent>-<random>`."""
    load_error: str = ""
    at_once: int = 1

    def load(self) -> None:
        if self.load_error:
            raise OSError(self.load_error)
        if self.loads is not None:
            (self.loads / f"{self.name}-{os.getpid()}-{os.getppid()}-{uuid.uuid4().hex}").touch()

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        if self.runs is not None:
            (self.runs / f"{task.ref.shard}-{os.getpid()}-{os.getppid()}-{uuid.uuid4().hex}").touch()
        if self.heals is None or not self.heals.exists():
            if task.ref.shard in self.deadly:
                os._exit(9)
            if task.ref.shard in self.broken:
                raise ValueError(f"no words for {task.ref.shard}")
            if task.ref.shard in self.full:
                raise OSError(errno.ENOSPC, "No space left on device", task.ref.shard)
        time.sleep(self.seconds)
        [name] = self.columns[next(iter(task.columns))].inputs
        source = latest(corpus, name, task.ref)
        with open_shard(corpus, task, source) as shard:
            for row in shard.rows(read_lines(corpus, source)):
                self.work_on(task, row)
                for column in shard.attempts:
                    words = f"{column} {row.scalars['caption']}"
                    shard.write_column(column, row, Output({"caption": words, "tokens": len(words.split())}))
            return shard.commit()

    def work_on(self, task: Task, row: Row) -> None:
        """Do to the process what the row is said to do."""
        if (task.ref.shard, row.row) in self.crashes:
            signal.raise_signal(signal.SIGSEGV)  # this thread, at once
        if (task.ref.shard, row.row) in self.hangs:
            time.sleep(3600)

    def write(self, corpus: Corpus, ref: ShardRef, *columns: str) -> list[Commit]:
        """Make these columns of a shard, without an engine."""
        return self.run(corpus, Task(ref, dict.fromkeys(columns, 0)))


def spec(*inputs: str) -> ColumnSpec:
    return ColumnSpec({"stage": "words"}, {"caption": "string", "tokens": "int32"}, inputs)


def source_words(**options: Any) -> Words:
    return Words("source words", {"captions/source": spec("images")}, **options)


def upper_words(**options: Any) -> Words:
    """A stage with a model, two columns from one."""
    columns = {"captions/upper": spec("captions/source"), "captions/lower": spec("captions/source")}
    return Words("upper words", columns, device="gpu", **options)


def open_corpus(url: str | Path, sources: Sequence[Pictures], stages: Sequence[Words]) -> Corpus:
    """The corpus with everything declared."""
    corpus = Corpus.create(url, "parts", shard_samples=ROWS)
    for source in sources:
        corpus.declare_source(source.name, source.stage())
    corpus.declare_column("images", {"stage": "images"}, IMAGE_SCALARS)
    for stage in stages:
        for column, made in stage.columns.items():
            corpus.declare_column(column, made.stage, made.scalars)
    return corpus
