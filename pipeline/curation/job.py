"""Table jobs: what all of them share. A job reads the newest commits of some columns and writes one small table, of the
samples that it found (docs/corpus.md, section 6); `pipeline.selection.view` shows it as columns of every sample."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT
from microdit.pipeline.corpus.records import canonical
from microdit.pipeline.tables.published import Table, cached
from microdit.pipeline.tables.sample_table import JOB_COLUMNS, ROW_GROUP, SampleTable

LAYOUT = 1
BASIC, EMBEDDING = "scores/basic", "scores/embedding"

DUPLICATES, SEMANTIC, CONTAMINATED, HASHES = (
    "tables/duplicates",
    "tables/semantic",
    "tables/contaminated",
    "tables/hashes",
)

PLACE = [pa.field("source", pa.string()), pa.field("shard", pa.string()), pa.field("row", pa.int32())]


class Job(Table):
    """The record of a table job: what it was asked, and what it counted."""

    samples: int
    """Those that it could read."""

    @property
    def present(self) -> str:
        """Which samples those are, as a condition on the sample table."""
        raise NotImplementedError

    def asked(self) -> dict[str, Any]:
        """What its result depends on, beside the commits that it read."""
        raise NotImplementedError


J = TypeVar("J", bound=Job)


def is_embedding(column: str) -> bool:
    """`scores/embedding`, or `scores/embedding-<name>`."""
    return column == EMBEDDING or column.startswith(f"{EMBEDDING}-")


def reads(folder: str, column: str) -> bool:
    """Whether the table job of this folder reads the commits of a column."""
    return column == "images" or (is_embedding(column) if folder == SEMANTIC else column == BASIC)


def job_base(folder: str, table: SampleTable) -> str:
    """What the objects of a table job begin with: its folder, and the hash of the commits that it reads."""
    names = [name for name in table.names if (found := COMMIT.fullmatch(name)) and reads(folder, found[1])]
    return f"{folder}/{hashlib.sha256(canonical({'layout': LAYOUT, 'commits': names})).hexdigest()}"


def made(corpus: Corpus, base: str, kind: type[J], alike: Callable[[J], bool]) -> J | None:
    """The table if it was made in this way; one that was made otherwise makes room."""
    found = cached(corpus, base, kind)
    if found is not None and not alike(found):
        corpus.store.delete([f"{base}.json", found.object.name])
        return None
    return found


def batches(corpus: Corpus, table: SampleTable, columns: list[str]) -> Iterator[pa.Table]:
    with corpus.store.open(table.object.name) as file:
        for batch in pq.ParquetFile(file).iter_batches(ROW_GROUP, columns=columns):
            yield pa.Table.from_batches([batch])


def keepers(labels: np.ndarray, area: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each sample the one of its group that is kept, and the size of its group."""
    order = np.lexsort((-area, labels))  # stable: of equal ones the first
    begins = np.ones(len(order), bool)
    begins[1:] = labels[order][1:] != labels[order][:-1]
    starts = np.flatnonzero(begins)
    sizes = np.diff(np.append(starts, len(order)))
    keeper, size = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    keeper[order], size[order] = np.repeat(order[starts], sizes), np.repeat(sizes, sizes)
    return keeper, size


def texts(corpus: Corpus, table: SampleTable, column: str, places: np.ndarray) -> pa.Array:
    """A column of the sample table at these lines, read once."""
    wanted, back = np.unique(places, return_inverse=True)
    parts: list[pa.ChunkedArray] = [pa.chunked_array([], pa.string())]
    number = 0
    for batch in batches(corpus, table, [column]):
        inside = wanted[np.searchsorted(wanted, number) : np.searchsorted(wanted, number + len(batch))]
        parts.append(batch[column].take(pa.array(inside - number)))
        number += len(batch)
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string()).take(pa.array(back))


def write_rows(
    corpus: Corpus, table: SampleTable, path: Path, places: np.ndarray, columns: list[Any], prefix: str
) -> int:
    """The table: source, shard and row of the places (in order), then the columns in the order of `JOB_COLUMNS`."""
    fields = [field for field in JOB_COLUMNS if field.name.startswith(prefix)]
    found = pa.table(columns, schema=pa.schema(fields))
    number = done = 0
    with pq.ParquetWriter(path, pa.schema([*PLACE, *fields]), compression="zstd") as writer:
        for batch in batches(corpus, table, [field.name for field in PLACE]):
            end = int(np.searchsorted(places, number + len(batch)))
            if end > done:
                part = batch.take(pa.array(places[done:end] - number))
                rows = found.slice(done, end - done)
                for field in fields:
                    part = part.append_column(field, rows[field.name])
                writer.write_table(part)
            number, done = number + len(batch), end
    return done
