"""Plain sources and stages to try the engine with: no image, no model, but real commits."""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.corpus import Commit, Corpus, ShardRef, UnitCommit, shard_name, unit_name
from pipeline.sources import Input
from pipeline.stages import ColumnSpec
from tests.pipeline.made import IMAGE_SCALARS, write_images

ROWS = 3  # inputs of a shard; row 2 fails at ingest


@dataclass
class Pictures:
    """A source of `count` units, each of `shards` shards."""

    name: str = "pictures"
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
    def running(self) -> Iterator[None]:
        if self.entered is not None:
            (self.entered / "running").touch()
        yield
        if self.entered is not None:
            (self.entered / "running").unlink()


def ingest(corpus: Corpus, source: Pictures, unit: str, report: Callable[[dict[str, Any]], None]) -> UnitCommit:
    """Write a unit's shards that are not there; the unit `...-000001` of a source named `broken` cannot be read."""
    if source.name == "broken" and unit.endswith("1"):
        raise OSError(f"{unit}: the disk is on fire")
    if source.entered is not None:
        assert (source.entered / "running").exists()
    names = [shard_name(unit, number) for number in range(source.shards)]
    for name in names:
        if (source.name, name) not in corpus.committed("images", source.name):
            commit = write_images(corpus, ShardRef(source=source.name, unit=unit, shard=name), rows=ROWS)
            report({"shard": name, **commit.counts})
    return corpus.commit_unit(source.name, unit, ROWS * source.shards, names)


@dataclass
class Words:
    """Writes captions columns from other columns; what it is asked to do wrong, it does wrong."""

    name: str
    columns: dict[str, ColumnSpec]
    device: str = "cpu"
    seconds: float = 0.0
    broken: tuple[str, ...] = ()
    """Shards on which it raises."""
    deadly: tuple[str, ...] = ()
    """Shards on which the process dies."""
    heals: Path | None = None
    """A file; when it is there, nothing is broken any more."""
    loads: Path | None = None
    """A folder that gets a file for every time that it is loaded."""
    load_error: str = ""

    def load(self) -> None:
        if self.load_error:
            raise OSError(self.load_error)
        if self.loads is not None:
            (self.loads / f"{self.name}-{uuid.uuid4().hex}").touch()

    def run(self, corpus: Corpus, ref: ShardRef, columns: Sequence[str]) -> list[Commit]:
        if self.heals is None or not self.heals.exists():
            if ref.shard in self.deadly:
                os._exit(9)
            if ref.shard in self.broken:
                raise ValueError(f"no words for {ref.shard}")
        time.sleep(self.seconds)
        return [self.write(corpus, ref, column) for column in columns]

    def write(self, corpus: Corpus, ref: ShardRef, column: str) -> Commit:
        inputs = [corpus.commit(name, ref.source, ref.shard, 0) for name in self.columns[column].inputs]
        with corpus.attempt(column, ref, inputs) as attempt:
            for line in corpus.sidecar(inputs[-1]).to_pylist():
                if line["status"] == "failed":
                    attempt.fail(line["row"], line["key"], "upstream")
                else:
                    words = f"{column} {line['caption']}"
                    attempt.add(line["row"], line["key"], caption=words, tokens=len(words.split()))
            return attempt.commit()


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
