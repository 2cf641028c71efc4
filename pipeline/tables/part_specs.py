"""Specify the parts of the sample table, and the keys that name them (docs/reference/corpus.md, section 6).

A text field of a column has parts of its own, all its other fields are in one: a query over numbers reads no captions.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import pyarrow as pa

from microdit.pipeline.corpus.names import IMAGES, ShardId
from microdit.pipeline.corpus.records import Declaration, canonical
from microdit.pipeline.corpus.shard_files import SCALAR_TYPES

LAYOUT = 2  # 1: all fields of a column in one part
RUN_SHARDS = 128  # at most, unless one unit has more
NUMBERED = re.compile(r".*-([0-9]{6,})(?:-r[0-9]+)?-[0-9]+")  # a shard's name: the number of its unit
SHORT = {"format", "license"}  # scalars of the images that are texts of few values

# of the images, before their scalars
IMAGE_FIELDS = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("unit", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("row", pa.int32()),
        pa.field("key", pa.string()),
        pa.field("status", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
LONG = {"key", "detail"}  # of these, texts that are another in each row


class FieldGroup(NamedTuple):
    """Fields of a column that share their parts: one text field, or (`text` is empty) all others."""

    column: str
    text: str


ROWS = FieldGroup(IMAGES, "")
"""The group that defines the table's rows."""


class CommitRef(NamedTuple):
    """Entry of the commit table for a shard; the last three are None in tables of older versions."""

    generation: int
    sha256: str
    unit: str | None
    attempt: str | None
    sidecar: str | None
    """The SHA-256 of its sidecar."""


@dataclass(frozen=True)
class ShardCommits:
    """A shard, its commits in the images and in one column, and rows that are left out."""

    shard: str
    rows: int
    """Of the images."""
    images: CommitRef
    own: CommitRef | None
    again: Sequence[int] = ()
    """Left out if they failed: a retry unit has them, too."""


@dataclass(frozen=True)
class RunOfShards:
    """The shards of a run in one column."""

    column: str
    source: str
    shards: tuple[ShardCommits, ...]
    scalars: Mapping[str, str]
    """Of the column, as declared."""

    @cached_property
    def digest(self) -> str:
        """A hash of the shards and their commits."""
        shards = [[one.shard, one.images.sha256, one.own and one.own.sha256, list(one.again)] for one in self.shards]
        return hashlib.sha256(canonical(shards)).hexdigest()

    def without(self, lost: Collection[ShardId]) -> "RunOfShards":
        """Leave out shards."""
        kept = tuple(one for one in self.shards if (self.source, one.shard) not in lost)
        return replace(self, shards=kept)


@dataclass(frozen=True)
class PartSpec:
    """Inputs of one part: the shards, and the fields of a group."""

    run: RunOfShards
    schema: pa.Schema

    @property
    def key(self) -> str:
        about = {
            "layout": LAYOUT,
            "column": self.run.column,
            "source": self.run.source,
            "fields": [[field.name, str(field.type)] for field in self.schema],
            "shards": self.run.digest,
        }
        return hashlib.sha256(canonical(about)).hexdigest()


def group_of(column: str, field: str, kind: pa.DataType) -> FieldGroup:
    """Tell which group a field of a column's parts is in."""
    if column == IMAGES and field in IMAGE_FIELDS.names:
        return FieldGroup(IMAGES, field if field in LONG else "")
    return FieldGroup(column, field if kind == pa.string() and not (column == IMAGES and field in SHORT) else "")


def part_schemas(column: str, declaration: Declaration) -> dict[FieldGroup, pa.Schema]:
    """List the fields of a column's parts by group: `ok` (of the images `IMAGE_FIELDS`), and its scalars."""
    first = IMAGE_FIELDS if column == IMAGES else [pa.field("ok", pa.bool_())]
    scalars = [pa.field(name, SCALAR_TYPES[kind]) for name, kind in declaration.scalars.items()]
    fields: dict[FieldGroup, list[pa.Field]] = defaultdict(list)
    for one in [*first, *scalars]:
        fields[group_of(column, one.name, one.type)].append(one)
    return {group: pa.schema(own) for group, own in fields.items()}


def runs_of(shards: Iterable[ShardId]) -> list[list[ShardId]]:
    """Cut shards, in their order, into runs of whole units that stay the same when others are added.

    A run is a power of two of units: as many as have `RUN_SHARDS` shards if all are as large as the largest.
    """
    by_source: dict[str, list[str]] = defaultdict(list)
    for source, shard in sorted(shards):
        by_source[source].append(shard)
    runs: dict[tuple[str, int], list[ShardId]] = defaultdict(list)
    for source, names in by_source.items():
        matches = [NUMBERED.fullmatch(name) for name in names]
        units = [int(match[1]) for match in matches if match]
        if len(units) < len(names):  # names that are not this project's: the order of shards comes first
            units = [0] * len(names)
        sizes: dict[int, int] = defaultdict(int)
        for unit in units:
            sizes[unit] += 1
        per_run = max(RUN_SHARDS >> (max(sizes.values()) - 1).bit_length(), 1)
        for unit, name in zip(units, names, strict=True):
            runs[source, unit // per_run].append((source, name))
    return [runs[run] for run in sorted(runs)]


def column_runs(
    column: str,
    declaration: Declaration,
    runs: Iterable[Sequence[ShardId]],
    newest: Mapping[str, Mapping[ShardId, CommitRef]],
    rows: Mapping[ShardId, int],
    again: Mapping[ShardId, Sequence[int]],
) -> list[RunOfShards]:
    """List the runs of a column, in the order of the table's rows.

    Args:
        newest: by column the newest commit of each shard.
        rows: of the images.
        again: rows that are left out if they failed.
    """
    images, own = newest[IMAGES], newest[column]
    return [
        RunOfShards(
            column,
            run[0][0],
            tuple(ShardCommits(id[1], rows[id], images[id], own.get(id), again.get(id, ())) for id in run),
            declaration.scalars,
        )
        for run in runs
    ]
