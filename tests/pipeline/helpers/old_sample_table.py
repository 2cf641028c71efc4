"""The sample table as it was made before it had parts: all sidecars joined in one go, to compare with."""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.base.errors import DamagedError, first_line
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, ShardId, commit_name
from microdit.pipeline.corpus.records import Commit, Declaration
from microdit.pipeline.corpus.retry_units import rows_taken_again
from microdit.pipeline.tables.sample_table import BASE, ROW_GROUP, TableField, table_fields, table_schema


def old_sample_table(corpus: Corpus) -> pa.Table:
    """Read all samples."""
    declared = corpus.columns()
    newest = {column: corpus.committed(column) for column in declared}
    again = rows_taken_again(corpus, newest["images"])
    parts = list(_read_parts(corpus, declared, newest, again))
    return pa.concat_tables([table_schema(declared).empty_table(), *parts])


def _read_parts(
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
