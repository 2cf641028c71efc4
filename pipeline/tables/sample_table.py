"""The sample table: all sidecars joined, cached in the corpus (docs/reference/corpus.md, section 6)."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import PrivateAttr

from microdit.pipeline.base.errors import DamagedError, RequestError, first_line
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, ShardId, commit_name
from microdit.pipeline.corpus.records import Commit, Declaration, ObjectRef, canonical
from microdit.pipeline.corpus.retry_units import rows_taken_again
from microdit.pipeline.corpus.shard_files import SCALAR_TYPES
from microdit.pipeline.tables.published import Table, cached, if_allowed, private, publish

LAYOUT, RETRIED = 1, 2  # of the sample table, and of one of a corpus that has retry units; others are not used
ROW_GROUP = 65_536
JOINS = "tables/joins"  # the folder of `microdit.pipeline.tables.joins.build`

BASE = pa.schema(
    [
        pa.field("id", pa.string()),
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


class SampleTable(Table):
    """The record of the cached sample table."""

    commits: str
    """Hash of `names`."""
    names: list[str]
    """Of the commits in it."""
    _written: dict[str, datetime] = PrivateAttr({})

    def newest(self, reads: Callable[[str], bool]) -> datetime | None:
        """When the newest commit of some columns was written, as far as there are any."""
        return max((moment for column, moment in self._written.items() if reads(column)), default=None)


def sample_table(corpus: Corpus, damage: list[str] | None = None) -> SampleTable:
    """Open or make the table of all samples of the newest commits: one row for each row of each `images` shard.

    Failed rows that a committed retry unit takes again are left out: they are rows of that. The table is cached in the
    corpus; a new commit, generation or column makes another one.

    Args:
        damage: if given, what cannot be read is named there and left out of a table for this process alone: a column of
            a shard as if it were not committed, the shard if that is `images`.

    Raises:
        RequestError: the corpus has no `images` column, or its commits contradict each other.
        DamagedError: a commit or sidecar is missing or damaged.
    """
    declared = corpus.columns()
    if "images" not in declared:
        raise RequestError(f"corpus {corpus.url}: it has no images yet; run `microdit build` first")
    listed = {column: corpus.listed_since(column) for column in declared}
    newest = {column: highest for column, (highest, _) in listed.items()}
    written = {column: moment for column, (_, moment) in listed.items() if moment is not None}
    names = sorted(
        commit_name(column, source, shard, generation)
        for column, generations in newest.items()
        for (source, shard), generation in generations.items()
    )
    commits = hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    again = rows_taken_again(corpus, newest["images"])
    about = canonical({"layout": RETRIED if again else LAYOUT, "columns": sorted(declared), "commits": commits})
    base = f"tables/{hashlib.sha256(about).hexdigest()}"
    table = cached(corpus, base, SampleTable, max(written.values(), default=None))

    def write(path: Path, damage: list[str] | None = None) -> int:
        rows = 0
        with pq.ParquetWriter(path, table_schema(declared), compression="zstd") as writer:
            for part in _parts(corpus, declared, newest, again, damage):
                writer.write_table(part)
                rows += len(part)
        return rows

    def record(data: ObjectRef, rows: int) -> SampleTable:
        return SampleTable(object=data, rows=rows, commits=commits, names=names)

    if table is None:
        try:
            with if_allowed():
                table = publish(corpus, base, write, record)
            table = table or private(write, record)
        except DamagedError:
            if damage is None:
                raise
            table = private(partial(write, damage=damage), record)
    table._written = written
    return table


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
    """The schema of the sample table of these columns."""
    return pa.schema([*BASE, *(pa.field(field.name, field.type) for field in table_fields(declared))])


def _parts(
    corpus: Corpus,
    declared: dict[str, Declaration],
    newest: dict[str, dict[ShardId, int]],
    again: Mapping[ShardId, Sequence[int]],
    damage: list[str] | None = None,
) -> Iterator[pa.Table]:
    """Read the table in parts of at least `ROW_GROUP` rows, ordered by source and shard."""
    fields, schema = table_fields(declared), table_schema(declared)

    def read(shard_id: ShardId) -> pa.Table | None:
        generations = {column: by_shard[shard_id] for column, by_shard in newest.items() if shard_id in by_shard}
        table = _shard_rows(shard_id, _sidecars(corpus, shard_id, generations, damage), fields)
        if table is not None and shard_id in again:
            left_out = pc.is_in(table["row"], value_set=pa.array(again[shard_id], pa.int32()))
            table = table.filter(pc.invert(pc.and_(left_out, pc.equal(table["status"], "failed"))))
        return table

    pending: list[pa.Table] = []
    for table in threaded(read, sorted(newest["images"])):
        if table is None:
            continue
        pending.append(table.cast(schema))
        if sum(map(len, pending)) >= ROW_GROUP:
            yield pa.concat_tables(pending).combine_chunks()
            pending = []
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _sidecars(
    corpus: Corpus, shard_id: ShardId, generations: dict[str, int], damage: list[str] | None
) -> dict[str, tuple[Commit, pa.Table]]:
    """Read the commits and sidecars of all columns of one shard; what is damaged is left out, or raises.

    Raises:
        DamagedError: one is missing or damaged, and `damage` is None.
    """
    read: dict[str, tuple[Commit, pa.Table]] = {}
    for column, generation in sorted(generations.items(), key=lambda item: item[0] != IMAGES):  # images first
        try:
            read[column] = _sidecar(corpus, column, shard_id, generation)
            rows, expected = len(read[column][1]), len(read[IMAGES][1]) if IMAGES in read else 0
            if IMAGES in read and not read[column][1]["row"].equals(read[IMAGES][1]["row"]):
                commit, _ = read.pop(column)
                raise DamagedError(
                    f"{commit.name}: its sidecar has {rows} rows, that of the images {expected}; run `microdit verify`"
                )
        except DamagedError as error:
            if damage is None:
                raise
            damage.append(str(error))
    return read


def _sidecar(corpus: Corpus, column: str, shard_id: ShardId, generation: int) -> tuple[Commit, pa.Table]:
    """Read a commit and its sidecar. Raises DamagedError if either is missing or damaged."""
    name = commit_name(column, *shard_id, generation)
    try:
        commit = corpus.commit(column, *shard_id, generation)
        name = commit.sidecar.name
        return commit, corpus.sidecar(commit)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise DamagedError(
            f"corpus {corpus.url}: {name} is missing or damaged ({first_line(error)}); run `microdit verify`, then "
            "`microdit build --repair`"
        ) from None


def _shard_rows(
    shard_id: ShardId, read: dict[str, tuple[Commit, pa.Table]], fields: list[TableField]
) -> pa.Table | None:
    """Join the sidecars of all columns of one shard, row by row; None if there are no images."""
    source, shard = shard_id
    sidecars = {column: sidecar for column, (_, sidecar) in read.items()}
    if IMAGES not in sidecars:
        return None
    images = sidecars[IMAGES]
    arrays: dict[str, pa.ChunkedArray | pa.Array] = {
        "id": pc.binary_join_element_wise(source, images["key"], "/"),
        "source": pa.repeat(source, len(images)),
        "unit": pa.repeat(read[IMAGES][0].unit, len(images)),
        "shard": pa.repeat(shard, len(images)),
    }
    arrays |= {name: images[name] for name in BASE.names if name not in arrays}
    for field in fields:
        sidecar = sidecars.get(field.column)
        if field.scalar is None:
            is_ok = pa.repeat(False, len(images)) if sidecar is None else pc.equal(sidecar["status"], "ok")
            arrays[field.name] = is_ok
        else:
            arrays[field.name] = pa.nulls(len(images), field.type) if sidecar is None else sidecar[field.scalar]
    return pa.table(arrays)
