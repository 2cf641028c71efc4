"""The parts of the sample table: one object for each column and run of units (docs/reference/corpus.md, section 6).

A part is named by a key, over the hashes of the commits that it was read from, and by the hash of its own bytes. So it
needs no record, is never out of date, and is made once, whatever else of the corpus grows.
"""

import atexit
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from microdit.pipeline.base.errors import DamagedError, first_line
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, PART, ShardId, commit_name
from microdit.pipeline.corpus.records import Commit, Declaration, ObjectRef, canonical
from microdit.pipeline.corpus.shard_files import SCALAR_TYPES
from microdit.pipeline.tables.published import if_allowed

FOLDER = "tables/samples"
LAYOUT = 1
RUN_SHARDS = 128  # at most, unless one unit has more
ROW_GROUP = 65_536
MOST_THREADS = 8  # each has a row group and a part's bytes in memory
NUMBERED = re.compile(r".*-([0-9]{6,})(?:-r[0-9]+)?-[0-9]+")  # a shard's name: the number of its unit

# of every part of the images, before their scalars
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


@dataclass(frozen=True)
class ShardCommits:
    """A shard, its generation and commit's hash in the images and in one column, and rows that are left out."""

    shard: str
    rows: int
    """Of the images."""
    images: tuple[int, str]
    own: tuple[int, str] | None
    again: Sequence[int] = ()
    """Left out if they failed: a retry unit has them, too."""


@dataclass(frozen=True)
class PartSpec:
    """Inputs of one part."""

    column: str
    source: str
    declaration: Declaration
    shards: tuple[ShardCommits, ...]

    @property
    def key(self) -> str:
        about = {
            "layout": LAYOUT,
            "column": self.column,
            "source": self.source,
            "scalars": self.declaration.scalars,
            "shards": [
                [one.shard, one.images[1], one.own[1] if one.own else None, list(one.again)] for one in self.shards
            ],
        }
        return hashlib.sha256(canonical(about)).hexdigest()

    @property
    def schema(self) -> pa.Schema:
        return part_schema(self.column, self.declaration)


def part_schema(column: str, declaration: Declaration) -> pa.Schema:
    """Return the fields of a column's parts: `ok` and its scalars; of the images `IMAGE_FIELDS` and theirs."""
    scalars = [pa.field(name, SCALAR_TYPES[kind]) for name, kind in declaration.scalars.items()]
    return pa.schema([*(IMAGE_FIELDS if column == IMAGES else [pa.field("ok", pa.bool_())]), *scalars])


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


def present_parts(corpus: Corpus) -> dict[str, ObjectRef]:
    """List the parts that are there, by their key."""
    found: dict[str, ObjectRef] = {}
    for item in sorted(corpus.store.list(FOLDER), key=lambda item: item.name, reverse=True):
        if match := PART.fullmatch(item.name):
            found[match[1]] = ObjectRef(name=item.name, size=item.size, sha256=match[2])
    return found


@dataclass(frozen=True)
class PartMade:
    """A part that was made, and the shards whose images cannot be read. One of this process alone has a whole path."""

    ref: ObjectRef
    lost: frozenset[ShardId] = frozenset()


def make_parts(corpus: Corpus, specs: Sequence[PartSpec], damage: list[str] | None) -> Iterator[PartMade]:
    """Make parts in threads, and publish each; what cannot be published is made for this process alone.

    Args:
        damage: as `sample_table` takes it: parts with damage are for this process alone.

    Raises:
        DamagedError: a commit or sidecar is missing or damaged.
    """
    console = Console(stderr=True)
    with Progress(
        TextColumn("reading sidecars"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=len(specs) < 16 or not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("sidecars", total=sum(len(spec.shards) for spec in specs))
        threads = min(os.cpu_count() or 1, MOST_THREADS)
        made = threaded(lambda spec: _make(corpus, spec, damage), specs, threads, threads)
        for spec, part in zip(specs, made, strict=True):
            bar.advance(task, len(spec.shards))
            yield part


def _make(corpus: Corpus, spec: PartSpec, damage: list[str] | None) -> PartMade:
    """Make one part; what is damaged is left out, if `damage` is given, and reported there."""
    lost: dict[ShardId, str] = {}
    try:
        data = _part_bytes(corpus, spec, None)
    except DamagedError:
        if damage is None:
            raise
        data = _part_bytes(corpus, spec, lost)
        damage += lost.values()
    digest = hashlib.sha256(data).hexdigest()
    name = f"{FOLDER}/{spec.key}.{digest}.parquet"
    if not lost:
        with if_allowed():
            with suppress(FileExistsError):  # another writer made the same bytes
                corpus.store.create(name, data)
            return PartMade(ObjectRef(name=name, size=len(data), sha256=digest))
    path = private_folder() / f"{os.urandom(16).hex()}.parquet"
    path.write_bytes(data)
    ref = ObjectRef(name=str(path), size=len(data), sha256=digest)
    return PartMade(ref, frozenset(lost) if spec.column == IMAGES else frozenset())


@cache
def private_folder() -> Path:
    """Make a folder for parts of this process alone; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="microdit-table-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _part_bytes(corpus: Corpus, spec: PartSpec, lost: dict[ShardId, str] | None) -> bytes:
    """Read the shards of a part, and write them as Parquet, row group by row group.

    Args:
        lost: if given, gets the shards that are missing or damaged, and why.

    Raises:
        DamagedError: one is, and `lost` is None.
    """
    buffer = io.BytesIO()
    pending: list[pa.Table] = []
    rows = 0
    with pq.ParquetWriter(buffer, spec.schema, compression="zstd", write_page_checksum=True) as writer:
        for one in spec.shards:
            try:
                table = _shard_rows(corpus, spec, one)
            except DamagedError as error:
                if lost is None:
                    raise
                lost[spec.source, one.shard] = str(error)
                table = spec.schema.empty_table()
                if spec.column != IMAGES:
                    table = _shard_rows(corpus, spec, replace(one, own=None))
            pending.append(table)
            rows += len(table)
            if rows >= ROW_GROUP:
                writer.write_table(pa.concat_tables(pending).combine_chunks())
                pending, rows = [], 0
        if rows:
            writer.write_table(pa.concat_tables(pending).combine_chunks())
    return buffer.getvalue()


def _shard_rows(corpus: Corpus, spec: PartSpec, one: ShardCommits) -> pa.Table:
    """Read the rows of a part in one shard; nulls where the column is not committed.

    Raises:
        DamagedError: a commit or sidecar is missing or damaged.
    """
    shard_id, names = (spec.source, one.shard), spec.schema.names
    images: pa.Table = None
    if spec.column == IMAGES or one.again:
        commit, images = _sidecar(corpus, IMAGES, shard_id, one.images)
    if spec.column == IMAGES:
        known = {"source": spec.source, "unit": commit.unit, "shard": one.shard}
        arrays = [pa.repeat(known[name], one.rows) if name in known else images[name] for name in names]
    elif one.own is not None:
        commit, own = _sidecar(corpus, spec.column, shard_id, one.own)
        if not np.array_equal(own["row"].to_numpy(), np.arange(one.rows)):
            raise DamagedError(
                f"{commit.name}: its sidecar has {len(own)} rows, that of the images {one.rows}; run `microdit verify`"
            )
        arrays = [pc.equal(own["status"], "ok"), *(own[name] for name in names[1:])]
    else:
        nulls = [pa.nulls(one.rows, field.type) for field in list(spec.schema)[1:]]
        arrays = [pa.repeat(False, one.rows), *nulls]
    table = pa.table(arrays, schema=spec.schema)
    if images is not None and one.again:
        left_out = pc.is_in(images["row"], value_set=pa.array(one.again, pa.int32()))
        table = table.filter(pc.invert(pc.and_(left_out, pc.equal(images["status"], "failed"))))
    return table


def _sidecar(corpus: Corpus, column: str, shard_id: ShardId, version: tuple[int, str]) -> tuple[Commit, pa.Table]:
    """Read a commit of a known hash, and of its sidecar what a part may need.

    Raises:
        DamagedError: either is missing or damaged, or the commit was made again meanwhile.
    """
    generation, sha256 = version
    name = commit_name(column, *shard_id, generation)
    try:
        commit = corpus.commit(column, *shard_id, generation)
        if commit.sha256 != sha256:
            raise DamagedError(f"corpus {corpus.url}: {name} was made again meanwhile; run the command again")
        name = commit.sidecar.name
        scalars = corpus.column(column).scalars
        return commit, corpus.sidecar(
            commit, [*(IMAGE_FIELDS.names[3:] if column == IMAGES else ("row", "status")), *scalars]
        )
    except (FileNotFoundError, pa.ArrowException) as error:
        raise DamagedError(
            f"corpus {corpus.url}: {name} is missing or damaged ({first_line(error)}); run `microdit verify`, then "
            "`microdit build --repair`"
        ) from None


def part_specs(
    column: str,
    declared: Mapping[str, Declaration],
    newest: Mapping[str, Mapping[ShardId, tuple[int, str]]],
    rows: Mapping[ShardId, int],
    again: Mapping[ShardId, Sequence[int]],
    lost: Collection[ShardId] = (),
) -> list[PartSpec]:
    """List the parts of a column, in the order of the table's rows.

    Args:
        newest: by column the generation and the hash of the newest commit of each shard.
        rows: of the images.
        again: rows that are left out if they failed.
        lost: shards whose images cannot be read.
    """
    images, own = newest[IMAGES], newest[column]
    return [
        PartSpec(
            column,
            run[0][0],
            declared[column],
            tuple(
                ShardCommits(id[1], rows[id], images[id], own.get(id), again.get(id, ()))
                for id in run
                if id not in lost
            ),
        )
        for run in runs_of(images)
    ]
