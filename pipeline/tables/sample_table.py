"""The sample table: all sidecars joined row by row, kept in parts (docs/reference/corpus.md, section 6)."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import pyarrow as pa

from microdit.pipeline.base.errors import DamagedError, RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, ShardId, commit_name
from microdit.pipeline.corpus.records import Declaration, ObjectRef
from microdit.pipeline.corpus.retry_units import rows_taken_again
from microdit.pipeline.corpus.shard_files import SCALAR_TYPES
from microdit.pipeline.tables.commit_table import CommitsRead, read_commits
from microdit.pipeline.tables.part_specs import (
    IMAGE_FIELDS,
    ROWS,
    CommitRef,
    FieldGroup,
    PartSpec,
    RunOfShards,
    column_runs,
    group_of,
    part_schemas,
    runs_of,
)
from microdit.pipeline.tables.sample_parts import make_parts, present_parts

ROW_GROUP = 65_536
JOINS = "tables/joins"  # the folder of `microdit.pipeline.tables.joins.build`

BASE = pa.schema([pa.field("id", pa.string()), *IMAGE_FIELDS])

JOB_COLUMNS = pa.schema(  # what the table jobs (`microdit.pipeline.curation.job`) add to the view
    [
        pa.field("duplicate_group", pa.string()),
        pa.field("duplicate_distance", pa.int16()),
        pa.field("duplicate_exact", pa.bool_()),
        pa.field("duplicate_keep", pa.bool_()),
        pa.field("semantic_group", pa.string()),
        pa.field("semantic_similarity", pa.float32()),
        pa.field("semantic_keep", pa.bool_()),
        pa.field("contaminated_by", pa.string()),
        pa.field("contaminated_distance", pa.int16()),
    ]
)


class TableField(NamedTuple):
    """A column of the sample table, and the column and scalar that it comes from.

    `scalar` is None for `has_...`: the sample is ok in that column.
    """

    name: str
    column: str
    scalar: str | None
    type: pa.DataType


class ViewColumn(NamedTuple):
    """A column of the view `samples`: the fields of the parts of a column that it is made of."""

    name: str
    column: str
    field: str
    """Empty for `id`, which is made of two."""
    type: pa.DataType
    groups: tuple[FieldGroup, ...]
    """Those of the field, or of the two."""


@dataclass
class SampleTable:
    """The sample table: its parts as far as they are made, and the commits that they are read from."""

    names: list[str]
    """Of the commits, sorted."""
    parts: dict[FieldGroup, list[ObjectRef]]
    """By group of a column that has commits, in the order of the rows; those of this process alone have a whole path.
    """
    written: dict[str, datetime]
    """By column when its newest commit was written."""
    schemas: dict[FieldGroup, pa.Schema]
    """All groups of the columns that have commits."""
    runs: dict[str, list[RunOfShards]] = field(repr=False, compare=False)
    """By column that has commits."""
    present: dict[str, ObjectRef] = field(repr=False, compare=False)
    """Parts that were there, by key."""
    damage: list[str] | None = field(default=None, repr=False, compare=False)
    """As `sample_table` takes it."""

    def newest(self, reads: Callable[[str], bool]) -> datetime | None:
        """Return when the newest commit of some columns was written, as far as there are any."""
        return max((moment for column, moment in self.written.items() if reads(column)), default=None)

    def specs(self, group: FieldGroup) -> list[PartSpec]:
        """List the parts of a group."""
        return [PartSpec(run, self.schemas[group]) for run in self.runs[group.column]]

    def make(self, corpus: Corpus, groups: Iterable[FieldGroup]) -> None:
        """Make the parts of groups that are not there yet, each column's in one pass; and those of the images' rows.

        Raises:
            DamagedError: a commit or sidecar is missing or damaged.
        """
        absent = {group for group in {ROWS, *groups} if group in self.schemas and group not in self.parts}
        of_images = sorted(group for group in absent if group.column == IMAGES)
        lost = self._add(corpus, [of_images])
        if lost and ROWS in of_images:
            self.runs = {column: [run.without(lost) for run in runs] for column, runs in self.runs.items()}
        others = sorted(absent - set(of_images))
        by_column = [[g for g in others if g.column == column] for column in sorted({g.column for g in others})]
        self._add(corpus, by_column)

    def _add(self, corpus: Corpus, columns: Sequence[Sequence[FieldGroup]]) -> set[ShardId]:
        """Find or make the parts of groups, which are given by column; returns the shards whose images are lost."""
        keyed = {group: [(spec.key, spec) for spec in self.specs(group)] for groups in columns for group in groups}
        missing: list[list[tuple[str, PartSpec]]] = []
        for groups in columns:
            for number in range(len(self.runs[groups[0].column]) if groups else 0):
                wanted = [keyed[group][number] for group in groups if keyed[group][number][0] not in self.present]
                missing += [wanted] if wanted else []
        refs, lost = dict(self.present), set[ShardId]()
        for wanted, made in zip(
            missing, make_parts(corpus, [[spec for _, spec in one] for one in missing], self.damage), strict=True
        ):
            refs |= {key: ref for (key, _), ref in zip(wanted, made.refs, strict=True)}
            lost |= made.lost
        self.parts |= {group: [refs[key] for key, _ in specs] for group, specs in keyed.items()}
        return lost


def sample_table(corpus: Corpus, damage: list[str] | None = None, reads: Collection[str] | None = ()) -> SampleTable:
    """Open the table of all samples of the newest commits: one row for each row of each `images` shard.

    Failed rows that a committed retry unit takes again are left out: they are rows of that. The parts of what is read
    that the corpus does not have yet are made, and kept there; others when they are asked for (`SampleTable.make`).

    Args:
        damage: if given, what cannot be read is named there and left out of parts for this process alone: a column of
            a shard as if it were not committed, the shard if that is `images`.
        reads: the columns of the view that are wanted at once; None for all.

    Raises:
        RequestError: the corpus has no `images` column, or its commits contradict each other.
        DamagedError: a commit or sidecar is missing or damaged.
    """
    declared = corpus.columns()
    if IMAGES not in declared:
        raise RequestError(f"corpus {corpus.url}: it has no images yet; run `microdit build` first")
    columns = view_columns(declared)  # raises
    table = _open(corpus, declared, read_commits(corpus), present_parts(corpus), damage)
    wanted = [column for column in columns if reads is None or column.name in reads]
    table.make(corpus, [group for column in wanted for group in column.groups])
    return table


def named_parts(corpus: Corpus) -> list[ObjectRef]:
    """List the parts of the table of the newest commits that are there; all of them if damage hides which those are."""
    present = present_parts(corpus)
    try:
        declared = corpus.columns()
        read = read_commits(corpus)
        if IMAGES not in declared:
            return []
        table = _open(corpus, declared, read, present, None)
    except DamagedError:
        return list(present.values())
    keys = (spec.key for group in table.schemas for spec in table.specs(group))
    return [present[key] for key in keys if key in present]


def _open(
    corpus: Corpus,
    declared: Mapping[str, Declaration],
    read: CommitsRead,
    present: dict[str, ObjectRef],
    damage: list[str] | None,
) -> SampleTable:
    """Find what the parts of the table are made of; makes none."""
    newest, rows, names = _newest_commits(read, declared, damage)
    again, runs = rows_taken_again(corpus, newest[IMAGES]), runs_of(newest[IMAGES])
    columns = sorted(column for column in declared if newest[column] or column == IMAGES)
    return SampleTable(
        names=names,
        parts={},
        written={column: when for column, when in read.written.items() if column in declared},
        schemas={g: schema for column in columns for g, schema in part_schemas(column, declared[column]).items()},
        runs={column: column_runs(column, declared[column], runs, newest, rows, again) for column in columns},
        present=present,
        damage=damage,
    )


def _newest_commits(
    read: CommitsRead, declared: Collection[str], damage: list[str] | None
) -> tuple[dict[str, dict[ShardId, CommitRef]], dict[ShardId, int], list[str]]:
    """Find the newest commit of each shard, by column; the images' rows; and the names of all."""
    newest: dict[str, dict[ShardId, CommitRef]] = {column: {} for column in declared}
    rows: dict[ShardId, int] = {}
    fields = ("column", "source", "shard", "in", "generation", "sha256", "unit", "attempt", "sidecar_sha256")
    lines = (read.table[name].to_pylist() for name in fields)
    for column, source, shard, count, *ref in zip(*lines, strict=True):
        of_column, shard_id = newest.get(column), (source, shard)
        if of_column is not None and (shard_id not in of_column or of_column[shard_id].generation < ref[0]):
            of_column[shard_id] = CommitRef(*ref)
            if column == IMAGES:
                rows[shard_id] = count
    unread: list[str] = []
    for (column, source, shard, generation), error in read.damaged.items():
        shard_id = (source, shard)
        known = newest.get(column, {}).get(shard_id)
        if column in declared and (known is None or known.generation < generation):
            if damage is None:
                raise error
            damage.append(str(error))
            newest[column].pop(shard_id, None)
            unread.append(commit_name(column, source, shard, generation))
    names = [commit_name(column, *id, ref.generation) for column, of in newest.items() for id, ref in of.items()]
    return newest, rows, sorted([*names, *unread])


def table_fields(declared: Mapping[str, Declaration]) -> list[TableField]:
    """Name the fields of the sample table that follow `BASE`.

    Raises:
        RequestError: two columns would have the same name.
    """
    fields = [TableField(name, "images", name, SCALAR_TYPES[kind]) for name, kind in declared["images"].scalars.items()]
    for column, declaration in sorted(declared.items()):
        kind, _, name = column.partition("/")
        if column == "images":
            continue
        if kind == "captions":
            prefix = f"caption_{name}"
        elif kind == "scores" and declaration.kind == "table":
            prefix = name
        else:
            prefix = re.sub(r"[^A-Za-z0-9_]", "_", column)
            fields.append(TableField(f"has_{prefix}", column, None, pa.bool_()))
        for scalar, type_name in declaration.scalars.items():
            own = {"captions": "caption", "scores": name.partition("-")[0]}.get(kind)  # what the column is about
            whole = prefix if scalar == own else f"{prefix}_{scalar}"
            fields.append(TableField(re.sub(r"[^A-Za-z0-9_]", "_", whole), column, scalar, SCALAR_TYPES[type_name]))
    taken = dict.fromkeys(BASE.names, "images") | dict.fromkeys([*JOB_COLUMNS.names, "contaminated"], "table jobs")
    for one in fields:
        if one.name in taken:
            raise RequestError(
                f"columns {taken[one.name]!r} and {one.column!r} would both be {one.name!r} in the sample table"
            )
        taken[one.name] = one.column
    return fields


def table_schema(declared: Mapping[str, Declaration]) -> pa.Schema:
    """Return the schema of the sample table of these columns."""
    return pa.schema([*BASE, *(pa.field(field.name, field.type) for field in table_fields(declared))])


def view_columns(declared: Mapping[str, Declaration]) -> list[ViewColumn]:
    """List the columns of the view `samples`: their fields, and the groups whose parts they read."""
    key = group_of(IMAGES, "key", pa.string())
    base = [ViewColumn("id", IMAGES, "", pa.string(), (ROWS, key))]
    known = [(field.name, IMAGES, field.name, field.type) for field in IMAGE_FIELDS]
    known += [(f.name, f.column, f.scalar or "ok", f.type) for f in table_fields(declared)]
    return base + [
        ViewColumn(name, column, field, kind, (group_of(column, field, kind),)) for name, column, field, kind in known
    ]
