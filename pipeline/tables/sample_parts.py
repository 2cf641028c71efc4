"""Make the parts of the sample table: one object for each group of fields and run of units.

A part is named by a key, over the hashes of the commits that it was read from, and by the hash of its own bytes. So it
needs no record, is never out of date, and is made once, whatever else of the corpus grows. Parts of one run are made
in one pass over its sidecars; many runs are shared out among processes, because most of the work holds Python's lock.
"""

import atexit
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from microdit.pipeline.base.bounded_process import run_bounded
from microdit.pipeline.base.errors import DamagedError, first_line
from microdit.pipeline.base.threads import chunks, threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, OBJECT, PART, ShardId, column_kind, commit_name
from microdit.pipeline.corpus.records import ObjectRef
from microdit.pipeline.corpus.shard_files import check_types, open_table
from microdit.pipeline.tables.part_specs import IMAGE_FIELDS, ROWS, CommitRef, PartSpec, RunOfShards, ShardCommits
from microdit.pipeline.tables.published import if_allowed

FOLDER = "tables/samples"
ROW_GROUP = 65_536
MOST_AT_ONCE = 8  # runs: each has a row group and its parts' bytes in memory
READERS = 8  # threads that read the sidecars of one run: a bucket answers late
APART_SHARDS = 1024  # so many are worth a process of their own, which takes a second to begin
PROCESS_MEMORY = 8 << 30


def present_parts(corpus: Corpus) -> dict[str, ObjectRef]:
    """List the parts that are there, by their key."""
    found: dict[str, ObjectRef] = {}
    for item in sorted(corpus.store.list(FOLDER), key=lambda item: item.name, reverse=True):
        if match := PART.fullmatch(item.name):
            found[match[1]] = ObjectRef(name=item.name, size=item.size, sha256=match[2])
    return found


@dataclass(frozen=True)
class RunMade:
    """The parts that were made of a run, the shards whose images cannot be read, and what is damaged.

    A part of this process alone has a whole path.
    """

    refs: list[ObjectRef]
    lost: frozenset[ShardId] = frozenset()
    damage: tuple[str, ...] = ()


def make_parts(corpus: Corpus, runs: Sequence[Sequence[PartSpec]], damage: list[str] | None) -> Iterator[RunMade]:
    """Make parts, and publish each; what cannot be published is made for this process alone.

    Args:
        runs: the wanted parts of each run; those of one have the same shards.
        damage: as `sample_table` takes it: parts with damage are for this process alone.

    Raises:
        DamagedError: a commit or sidecar is missing or damaged.
    """
    folder, lenient = private_folder(), damage is not None
    at_once = min(os.cpu_count() or 1, MOST_AT_ONCE)
    shards = sum(len(specs[0].run.shards) for specs in runs)
    console = Console(stderr=True)
    with Progress(
        TextColumn("reading sidecars"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=len(runs) < 16 or not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("sidecars", total=shards)

        def apart(some: Sequence[Sequence[PartSpec]]) -> list[RunMade]:
            made: list[RunMade] = run_bounded(
                _make_all, corpus, some, folder, lenient, seconds=None, memory=PROCESS_MEMORY
            )
            return made

        def here(some: Sequence[Sequence[PartSpec]]) -> list[RunMade]:
            return _make_all(corpus, some, folder, lenient)

        many = at_once > 1 and shards >= 2 * APART_SHARDS
        shared_out = list(chunks(runs, max(1, APART_SHARDS * len(runs) // shards))) if many else [[run] for run in runs]
        all_made = threaded(apart if many else here, shared_out, at_once, at_once)
        for some, made in zip(shared_out, all_made, strict=True):
            bar.advance(task, sum(len(specs[0].run.shards) for specs in some))
            for one in made:
                if damage is not None:
                    damage += one.damage
                yield one


def _make_all(corpus: Corpus, runs: Sequence[Sequence[PartSpec]], folder: Path, lenient: bool) -> list[RunMade]:
    """Make the parts of some runs."""
    return [_make(corpus, specs, folder, lenient) for specs in runs]


def _make(corpus: Corpus, specs: Sequence[PartSpec], folder: Path, lenient: bool) -> RunMade:
    """Make parts of one run; what is damaged is left out, if `lenient`."""
    lost: dict[ShardId, str] = {}
    try:
        files = _part_bytes(corpus, specs, None)
    except DamagedError:
        if not lenient:
            raise
        files = _part_bytes(corpus, specs, lost)
    refs = [_keep(corpus, spec, data, folder, bool(lost)) for spec, data in zip(specs, files, strict=True)]
    whole = any(_says_rows(spec) for spec in specs)
    return RunMade(refs, frozenset(lost) if whole else frozenset(), tuple(lost.values()))


def _says_rows(spec: PartSpec) -> bool:
    """Tell whether this is a part of the group that says which rows there are."""
    return spec.run.column == ROWS.column and "source" in spec.schema.names


def _keep(corpus: Corpus, spec: PartSpec, data: bytes, folder: Path, apart: bool) -> ObjectRef:
    """Publish a part; or write it to `folder`, where the corpus may not be written, or the part is to be `apart`."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"{FOLDER}/{spec.key}.{digest}.parquet"
    if not apart:
        with if_allowed():
            with suppress(FileExistsError):  # another writer made the same bytes
                corpus.store.create(name, data)
            return ObjectRef(name=name, size=len(data), sha256=digest)
    path = folder / f"{os.urandom(16).hex()}.parquet"
    path.write_bytes(data)
    return ObjectRef(name=str(path), size=len(data), sha256=digest)


@cache
def private_folder() -> Path:
    """Make a folder for parts of this process alone; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="microdit-table-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _part_bytes(corpus: Corpus, specs: Sequence[PartSpec], lost: dict[ShardId, str] | None) -> list[bytes]:
    """Read the shards of a run, and write its parts as Parquet, row group by row group.

    Args:
        lost: if given, gets the shards that are missing or damaged, and why.

    Raises:
        DamagedError: one is, and `lost` is None.
    """
    run = specs[0].run
    schema = pa.schema([field for spec in specs for field in spec.schema])
    buffers = [io.BytesIO() for _ in specs]
    pending: list[pa.Table] = []
    with ExitStack() as stack:
        writers = [
            stack.enter_context(pq.ParquetWriter(buffer, spec.schema, compression="zstd", write_page_checksum=True))
            for buffer, spec in zip(buffers, specs, strict=True)
        ]

        def write() -> None:
            table = pa.concat_tables(pending).combine_chunks()
            for writer, spec in zip(writers, specs, strict=True):
                writer.write_table(table.select(spec.schema.names))
            pending.clear()

        def read(one: ShardCommits) -> pa.Table | DamagedError:
            try:
                return _shard_rows(corpus, run, schema, one)
            except DamagedError as error:
                return error

        for one, table in zip(run.shards, threaded(read, run.shards, READERS), strict=True):
            if isinstance(table, DamagedError):
                if lost is None:
                    raise table
                lost[run.source, one.shard] = str(table)
                table = _without(corpus, run, schema, one)
            pending.append(table)
            if sum(map(len, pending)) >= ROW_GROUP:
                write()
        if any(map(len, pending)):
            write()
    return [buffer.getvalue() for buffer in buffers]


def _without(corpus: Corpus, run: RunOfShards, schema: pa.Schema, one: ShardCommits) -> pa.Table:
    """Return what a part has of a shard that cannot be read: nothing of the images' rows, of all others nulls."""
    if run.column == IMAGES and "source" in schema.names:
        return schema.empty_table()
    return _shard_rows(corpus, run, schema, replace(one, own=None))


def _shard_rows(corpus: Corpus, run: RunOfShards, schema: pa.Schema, one: ShardCommits) -> pa.Table:
    """Read the rows of parts in one shard; nulls where the column is not committed.

    Raises:
        DamagedError: a commit or sidecar is missing or damaged.
    """
    names = schema.names
    own: pa.Table = None
    if one.own is not None:
        wanted = [name for name in names if run.column == IMAGES or name != "ok"]
        wanted = [name for name in wanted if not (run.column == IMAGES and name in IMAGE_FIELDS.names[:3])]
        unit, own = _sidecar(corpus, run, one, one.own, [*wanted, "row", "status"])
        if not np.array_equal(own["row"].to_numpy(), np.arange(one.rows)):
            name = commit_name(run.column, run.source, one.shard, one.own.generation)
            raise DamagedError(
                f"{name}: its sidecar has {len(own)} rows, that of the images {one.rows}; run `microdit verify`"
            )
        known = {"source": run.source, "unit": unit, "shard": one.shard} if run.column == IMAGES else {}
        arrays = [
            pa.repeat(pa.scalar(known[name], pa.string()), one.rows) if name in known
            else pc.equal(own["status"], "ok") if name == "ok" and run.column != IMAGES
            else own[name]
            for name in names
        ]  # fmt: skip
    else:
        arrays = [pa.repeat(False, one.rows) if f.name == "ok" else pa.nulls(one.rows, f.type) for f in schema]
    table = pa.table(arrays, schema=schema)
    if one.again:
        images = own
        if run.column != IMAGES or own is None:
            _, images = _sidecar(corpus, replace(run, column=IMAGES, scalars={}), one, one.images, ["row", "status"])
        left_out = pc.is_in(images["row"], value_set=pa.array(one.again, pa.int32()))
        table = table.filter(pc.invert(pc.and_(left_out, pc.equal(images["status"], "failed"))))
    return table


def _sidecar(
    corpus: Corpus, run: RunOfShards, one: ShardCommits, ref: CommitRef, fields: Sequence[str]
) -> tuple[str, pa.Table]:
    """Read some fields of a commit's sidecar; returns its unit, too.

    Where the commit table does not say where the sidecar is, the commit does.

    Raises:
        DamagedError: either is missing or damaged, or the commit was made again meanwhile.
    """
    name = commit_name(run.column, run.source, one.shard, ref.generation)
    try:
        if ref.attempt is None:
            commit = corpus.commit(run.column, run.source, one.shard, ref.generation)
            if commit.sha256 != ref.sha256:
                raise DamagedError(f"corpus {corpus.url}: {name} was made again meanwhile; run the command again")
            ref = ref._replace(unit=commit.unit, attempt=commit.attempt, sidecar=commit.sidecar.sha256)
        kind = "parquet" if column_kind(run.column) == "table" else "rows.parquet"
        name = f"{run.column}/{run.source}/{one.shard}.{ref.attempt}.{kind}"
        if not OBJECT.fullmatch(name):
            raise ValueError("it is no name of a sidecar")
        data = corpus.store.get_buffer(name)
        if hashlib.sha256(data).hexdigest() != ref.sidecar:
            raise ValueError("it has another checksum")
        file = open_table(pa.BufferReader(data), one.rows if run.column == IMAGES else None)
        check_types(file.schema_arrow, run.scalars)
        return str(ref.unit), file.read(list(dict.fromkeys(fields)), use_threads=False)
    except DamagedError:
        raise
    except (FileNotFoundError, ValueError) as error:  # pyarrow's errors are, too
        raise DamagedError(
            f"corpus {corpus.url}: {name} is missing or damaged ({first_line(error)}); run `microdit verify`, then "
            "`microdit build --repair`"
        ) from None
