"""The sample table: all sidecars joined row by row, kept in parts (docs/reference/corpus.md, section 6)."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
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
from microdit.pipeline.tables.sample_parts import IMAGE_FIELDS, PartSpec, make_parts, part_specs, present_parts

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
    """A column of the view `samples`: SQL over the parts of a column."""

    name: str
    column: str
    sql: str
    type: pa.DataType


@dataclass(frozen=True)
class SampleTable:
    """The sample table: its parts, and the commits that they were read from."""

    names: list[str]
    """Of the commits, sorted."""
    parts: dict[str, list[ObjectRef]]
    """By column that has commits, in the order of the rows; those of this process alone have a whole path."""
    written: dict[str, datetime]
    """By column when its newest commit was written."""

    def newest(self, reads: Callable[[str], bool]) -> datetime | None:
        """Return when the newest commit of some columns was written, as far as there are any."""
        return max((moment for column, moment in self.written.items() if reads(column)), default=None)


def sample_table(corpus: Corpus, damage: list[str] | None = None) -> SampleTable:
    """Open the table of all samples of the newest commits: one row for each row of each `images` shard.

    Failed rows that a committed retry unit takes again are left out: they are rows of that. The parts that the corpus
    does not have yet are made, and kept there.

    Args:
        damage: if given, what cannot be read is named there and left out of parts for this process alone: a column of
            a shard as if it were not committed, the shard if that is `images`.

    Raises:
        RequestError: the corpus has no `images` column, or its commits contradict each other.
        DamagedError: a commit or sidecar is missing or damaged.
    """
    declared = corpus.columns()
    if IMAGES not in declared:
        raise RequestError(f"corpus {corpus.url}: it has no images yet; run `microdit build` first")
    table_fields(declared)  # raises
    read = read_commits(corpus)
    newest, rows, names = _newest_commits(read, declared, damage)
    again = rows_taken_again(corpus, newest[IMAGES])
    present, parts = present_parts(corpus), {}
    parts[IMAGES], lost = _refs(corpus, part_specs(IMAGES, declared, newest, rows, again), present, damage)
    missing = [
        spec
        for column in sorted(declared)
        if column != IMAGES and newest[column]
        for spec in part_specs(column, declared, newest, rows, again, lost)
    ]
    refs, _ = _refs(corpus, missing, present, damage)
    for spec, ref in zip(missing, refs, strict=True):
        parts.setdefault(spec.column, []).append(ref)
    return SampleTable(names, parts, {c: when for c, when in read.written.items() if c in declared})


def named_parts(corpus: Corpus) -> list[ObjectRef]:
    """List the parts of the table of the newest commits that are there; all of them if damage hides which those are."""
    present = present_parts(corpus)
    try:
        declared = corpus.columns()
        read = read_commits(corpus)
        newest, rows, _ = _newest_commits(read, declared, None)
        if IMAGES not in declared:
            return []
        again = rows_taken_again(corpus, newest[IMAGES])
    except DamagedError:
        return list(present.values())
    specs = [spec for c in declared if newest[c] for spec in part_specs(c, declared, newest, rows, again)]
    return [present[key] for spec in specs if (key := spec.key) in present]


def _newest_commits(
    read: CommitsRead, declared: Collection[str], damage: list[str] | None
) -> tuple[dict[str, dict[ShardId, tuple[int, str]]], dict[ShardId, int], list[str]]:
    """Find the newest commit of each shard: by column generation and hash, the images' rows, and all names."""
    newest: dict[str, dict[ShardId, tuple[int, str]]] = {column: {} for column in declared}
    rows: dict[ShardId, int] = {}
    lines = (read.table[name].to_pylist() for name in ("column", "source", "shard", "generation", "sha256", "in"))
    for column, source, shard, generation, sha256, count in zip(*lines, strict=True):
        of_column, shard_id = newest.get(column), (source, shard)
        if of_column is not None and (shard_id not in of_column or of_column[shard_id][0] < generation):
            of_column[shard_id] = (generation, sha256)
            if column == IMAGES:
                rows[shard_id] = count
    unread: list[str] = []
    for (column, source, shard, generation), error in read.damaged.items():
        shard_id = (source, shard)
        if column in declared and newest[column].get(shard_id, (-1, ""))[0] < generation:
            if damage is None:
                raise error
            damage.append(str(error))
            newest[column].pop(shard_id, None)
            unread.append(commit_name(column, source, shard, generation))
    names = [commit_name(column, *id, version[0]) for column, of in newest.items() for id, version in of.items()]
    return newest, rows, sorted([*names, *unread])


def _refs(
    corpus: Corpus, specs: Sequence[PartSpec], present: Mapping[str, ObjectRef], damage: list[str] | None
) -> tuple[list[ObjectRef], set[ShardId]]:
    """Find or make parts; returns them and the shards whose images are lost."""
    keys = [spec.key for spec in specs]
    absent = [number for number, key in enumerate(keys) if key not in present]
    refs = {key: present[key] for key in keys if key in present}
    lost: set[ShardId] = set()
    for number, made in zip(absent, make_parts(corpus, [specs[n] for n in absent], damage), strict=True):
        refs[keys[number]] = made.ref
        lost |= made.lost
    return [refs[key] for key in keys], lost


def table_fields(declared: dict[str, Declaration]) -> list[TableField]:
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
    for field in fields:
        if field.name in taken:
            raise RequestError(
                f"columns {taken[field.name]!r} and {field.column!r} would both be {field.name!r} in the sample table"
            )
        taken[field.name] = field.column
    return fields


def table_schema(declared: dict[str, Declaration]) -> pa.Schema:
    """Return the schema of the sample table of these columns."""
    return pa.schema([*BASE, *(pa.field(field.name, field.type) for field in table_fields(declared))])


def view_columns(declared: dict[str, Declaration]) -> list[ViewColumn]:
    """List the columns of the view `samples`: their SQL, and the column whose parts it reads."""
    base = [ViewColumn("id", IMAGES, "source || '/' || key", pa.string())]
    base += [ViewColumn(field.name, IMAGES, field.name, field.type) for field in IMAGE_FIELDS]
    more = [ViewColumn(f.name, f.column, f.scalar or "ok", f.type) for f in table_fields(declared)]
    return base + more
