"""Learn from the commits of a past build: bytes, failures and times by column, source and stage.

Of many shards some are read, evenly spaced. No object is opened but one sidecar for each column.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.captions import CAPTIONERS, CaptionsColumn
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.config.scores import ScoresColumn
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS, ShardId, column_kind
from microdit.pipeline.corpus.records import Commit, Declaration, UnitCommit
from microdit.pipeline.corpus.retry_units import is_retry
from microdit.pipeline.stages.ingest import ingest_stage

T = TypeVar("T")
MOST = 256  # shards that are read of a column and source, and units of a source
TAR_END = 5_888  # bytes: two empty blocks, and the padding to 10,240, which is 4,864 in the mean
WARM = 4  # shards from which on the first one counts no time: its process was still importing


@dataclass(frozen=True)
class ShardSize:
    """Bytes of a column's shards: so many for each good sample, each row and each shard."""

    shards: int
    """Number of samples that it was measured on."""
    out: float
    """The share of the inputs that were good."""
    sample: float
    """Bytes of the object for each good sample; 0 in a table, which is its own sidecar."""
    row: float
    """Bytes of the sidecar for each row."""
    shard: float
    """Bytes for each shard besides: ends and footers of its two files."""

    def bytes(self, inputs: float, shards: float) -> float:
        """Return bytes of all shards of a source together."""
        return inputs * (self.out * self.sample + self.row) + shards * self.shard


@dataclass(frozen=True)
class Pace:
    """Cost of one input of a stage, in seconds of one worker."""

    shards: int
    """Number of samples that it was measured on."""
    seconds: float
    """By the clock. Of ingest the mean, with all waits for servers; of others the median of the shards, because the
    first ones of a short build compete with models that are being loaded."""
    unit_seconds: float
    """Of ingest, for each unit besides: until its first input has come; for a file that is its download."""
    cpu_seconds: float
    """Of processors; all of the time where the commits do not say it."""
    model_share: float
    """The part of the time that was the model's."""
    devices: frozenset[str]
    """Devices of the stage: `cpu`, or GPUs' names; empty if the commits do not record it."""
    has_cpu: bool
    """The commits say the CPU seconds."""


class PastBuild:
    """A corpus to learn from.

    Raises:
        RequestError: there is no corpus, or nothing in it is committed.
    """

    def __init__(self, url: str):
        self.corpus = Corpus.open(url)
        if not self.corpus.committed(IMAGES):
            raise RequestError(f"corpus {url}: no shard of it is committed, so there is nothing to learn from")
        self._commits: dict[tuple[str, str], list[Commit]] = {}
        self._units: dict[str, list[UnitCommit]] = {}

    @cached_property
    def sources(self) -> list[str]:
        return sorted(self.corpus.sources())

    @cached_property
    def columns(self) -> dict[str, Declaration]:
        return self.corpus.columns()

    def size(self, column: str, source: str) -> ShardSize | None:
        """Learn the size of a column's shards; None if it was not built of this source."""
        commits = self._commits_of(column, source)
        inputs, out = (sum(commit.counts[what] for commit in commits) for what in ("in", "out"))
        if not inputs:
            return None
        footer, tar = self._footer(max(commits, key=lambda c: c.counts["in"])), column_kind(column) == "tar"
        sidecars = sum(commit.sidecar.size for commit in commits) - len(commits) * footer
        objects = sum(commit.object.size for commit in commits) - len(commits) * TAR_END if tar else 0
        return ShardSize(
            shards=len(commits),
            out=out / inputs,
            sample=max(objects, 0) / max(out, 1),
            row=max(sidecars, 0) / inputs,
            shard=footer + TAR_END * tar,
        )

    def pace(self, columns: Sequence[str], source: str) -> Pace | None:
        """Learn the pace of the stage that makes these columns together; None if it has not made them all.

        Without shards of this source those of others count, but not for ingest: images differ, and so do servers.
        """
        sources = [source] if IMAGES in columns or self._commits_of(IMAGES, source) else self.sources
        by_shard: dict[str, list[Commit]] = {}
        for column in columns:
            if not (commits := [commit for name in sources for commit in self._commits_of(column, name)]):
                return None
            for commit in commits:
                by_shard.setdefault(f"{commit.source}/{commit.shard}", []).append(commit)
        # columns that are made together have each the time of all
        made = sorted(by_shard.values(), key=lambda shard: min(commit.attempt for commit in shard))
        made = made[1:] if len(made) >= WARM and IMAGES not in columns else made
        inputs = sum(shard[0].counts["in"] for shard in made)

        def total(name: str, default: str = "") -> float:
            return sum(max(c.timings.get(name, c.timings.get(default, 0.0)) for c in shard) for shard in made)

        seconds, units = total("seconds"), len({commit.unit for shard in made for commit in shard})
        each = [max(c.timings.get("seconds", 0.0) for c in shard) / shard[0].counts["in"] for shard in made]
        encoding = sum(c.timings.get("encode_seconds", 0.0) for shard in made for c in shard)  # of each its own
        return Pace(
            shards=len(made),
            seconds=seconds / inputs if IMAGES in columns else median(each),
            unit_seconds=total("wait_seconds") / units,
            cpu_seconds=total("cpu_seconds", "seconds") / inputs,
            model_share=min(encoding / seconds, 1.0) if seconds else 0.0,
            devices=frozenset(commit.device for shard in made for commit in shard if commit.device),
            has_cpu=all("cpu_seconds" in commit.timings for shard in made for commit in shard),
        )

    def inputs_of_a_unit(self, source: str) -> float | None:
        """Mean number of inputs of a unit; None if no unit is complete, or if only a part was taken (`limit`)."""
        if source not in self.sources or "limit" in self.corpus.source(source).made_by:
            return None
        units = self._units_of(source)
        return sum(unit.inputs for unit in units) / len(units) if units else None

    def words(self, column: str, source: str) -> float | None:
        """Mean number of words of a caption; None if the captions column was not built of this source."""
        commits = self._commits_of(column, source)
        counts = [n for c in commits[:8] for n in self.corpus.sidecar(c)["tokens"].to_pylist() if n is not None]
        return sum(counts) / len(counts) if counts else None

    def otherwise(self, config: BuildConfig) -> dict[str, str]:
        """Find columns that this corpus made with other options than the config, and the first that differs."""
        notes = {}
        for source in self.sources:
            made = self.corpus.source(source).made_by.get("images")
            if isinstance(made, dict) and (note := _differs(made, ingest_stage(config.images))):
                notes[IMAGES] = f"images.{note}"
        for name, options in config.columns.items():
            if name in self.columns:
                made, asked = self.columns[name].made_by, {}
                if isinstance(options, LatentsColumn):
                    asked = options.model_dump()
                if isinstance(options, TextColumn):  # whose declaration leaves out defaults
                    asked = options.model_dump(include={"encoder", "storage", "trim"})
                    made = {"storage": "float16", "trim": "trim" in (made.get("model") or {}), **made}
                if isinstance(options, CaptionsColumn) and options.field is not None:
                    asked = {"field": options.field, "fallback": options.fallback}
                if isinstance(options, CaptionsColumn) and options.origin in CAPTIONERS:
                    asked = {"captioner": options.vlm or options.tags or options.model}
                if isinstance(options, ScoresColumn) and hasattr(options, "model"):
                    asked = {"name": options.model}
                asked.pop("revision", None)  # another one has the same shapes
                if note := _differs(made, asked):
                    notes[name] = note
        return notes

    # -- commits -------------------------------------------------------------------------------------------------------

    def _commits_of(self, column: str, source: str) -> list[Commit]:
        if (column, source) not in self._commits:
            listed = spread([(shard, number) for (_, shard), number in self._listed(column, source)])
            read = threaded(lambda item: self.corpus.commit(column, source, *item), listed)
            self._commits[column, source] = list(read)
        return self._commits[column, source]

    def _units_of(self, source: str) -> list[UnitCommit]:
        if source not in self._units:
            listed = spread([(unit, number) for (_, unit), number in self._listed(UNITS, source)])
            self._units[source] = list(threaded(lambda item: self.corpus.unit(source, *item), listed))
        return self._units[source]

    def _listed(self, column: str, source: str) -> list[tuple[ShardId, int]]:
        """List the newest commits, but for those of retry units, which are no measure for others."""
        listed = self.corpus.committed(column, source)
        return sorted(item for item in listed.items() if not is_retry(item[0][1]))

    def _footer(self, commit: Commit) -> float:
        """Measure the bytes of a sidecar beside its rows: how many more it has if it is cut in two."""
        table = self.corpus.sidecar(commit)
        half = len(table) // 2
        return max(_written(table[:half]) + _written(table[half:]) - _written(table), 0.0)


def spread(items: Sequence[T], most: int = MOST) -> list[T]:
    """Take up to `most` items, evenly spaced, including the first."""
    step = max(len(items) / most, 1.0)
    return [items[int(i * step)] for i in range(min(len(items), most))]


def _written(table: pa.Table) -> int:
    """Return bytes of the table as a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.tell()


def _differs(made: Mapping[str, object], asked: Mapping[str, object]) -> str:
    """Name the first option that differs, with both values; empty if none does."""
    for name, value in asked.items():
        if made.get(name) != value:
            return f"{name} was {made.get(name)!r}, is {value!r}"
    return ""
