"""Common parts of table jobs: records, names, and access to the sample table (docs/reference/corpus.md, section 6).

A table job reads the newest commits of some columns and writes one small table about some of the samples;
`pipeline.selection.view` shows it as columns of every sample.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT
from microdit.pipeline.corpus.records import canonical
from microdit.pipeline.curation.greedy import KeptGroups
from microdit.pipeline.tables.part_files import read_batches
from microdit.pipeline.tables.published import Table, cached
from microdit.pipeline.tables.sample_table import JOB_COLUMNS, SampleTable

LAYOUT = 1
BASIC, TURNED, EMBEDDING = "scores/basic", "scores/turned", "scores/embedding"

DUPLICATES, SEMANTIC, CONTAMINATED, HASHES = (
    "tables/duplicates",
    "tables/semantic",
    "tables/contaminated",
    "tables/hashes",
)

ROW_ID = [pa.field("source", pa.string()), pa.field("shard", pa.string()), pa.field("row", pa.int32())]


class TableJob(Table):
    """The record of a table job: its parameters and its counts."""

    samples: int
    """Samples that have what the job reads."""
    method: int = 1
    """How it chooses. Tables of an older number are shown as they are, and made again by the next run of the job."""

    @property
    def present(self) -> str:
        """Those samples, as a condition on the sample table."""
        raise NotImplementedError

    def asked(self) -> dict[str, Any]:
        """Return the parameters: what the result depends on, beside the commits that were read."""
        raise NotImplementedError


class GroupsTable(TableJob):
    """The record of a table job that groups samples and keeps one of each group."""

    groups: int
    """Of two or more samples."""
    cut: int
    """Samples that were not compared with all that they should be, summed over the comparisons."""
    largest: int = 0
    """Samples of the largest group."""
    beyond: int = 0
    """Dropped samples that are further than was asked for from the one that is kept of their group."""

    @property
    def counts(self) -> dict[str, Any]:
        """Counts that the results of all such jobs have: `samples` = `kept` + `dropped`."""
        dropped = self.rows - self.groups
        return {
            "path": self.object.name,
            "samples": self.samples,
            "groups": self.groups,
            "dropped": dropped,
            "kept": self.samples - dropped,
            "cut": self.cut,
            "largest": self.largest,
            "beyond": self.beyond,
        }


@dataclass(frozen=True)
class Grouped:
    """Result of a table job that groups samples: `samples` = `kept` + `dropped`."""

    path: str
    """Of the table."""
    samples: int
    groups: int
    """Of two or more samples."""
    dropped: int
    kept: int
    cut: int
    largest: int
    beyond: int
    """As `GroupsTable` has them."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


J = TypeVar("J", bound=TableJob)


def is_embedding(column: str) -> bool:
    """Recognise `scores/embedding` and `scores/embedding-<name>`."""
    return column == EMBEDDING or column.startswith(f"{EMBEDDING}-")


def reads(folder: str, column: str) -> bool:
    """Tell whether the table job of this folder reads the commits of a column."""
    return column == "images" or (is_embedding(column) if folder == SEMANTIC else column in (BASIC, TURNED))


def job_base(folder: str, table: SampleTable) -> str:
    """Name the objects of a table job: its folder, and the hash of the commits that it reads."""
    names = [name for name in table.names if (commit := COMMIT.fullmatch(name)) and reads(folder, commit[1])]
    return f"{folder}/{hashlib.sha256(canonical({'layout': LAYOUT, 'commits': names})).hexdigest()}"


def job_since(folder: str, table: SampleTable) -> datetime | None:
    """Return when the newest of the commits that a table job reads was written: an older result is of other commits."""
    return table.newest(lambda column: reads(folder, column))


def cached_job(corpus: Corpus, table: SampleTable, base: str, kind: type[J], same: Callable[[J], bool]) -> J | None:
    """Return the cached result if it was built with the same parameters. One built with others is deleted."""
    job = cached(corpus, base, kind, job_since(base.rpartition("/")[0], table))
    if job is not None and not same(job):
        corpus.store.delete([f"{base}.json", job.object.name])
        return None
    return job


def batches(corpus: Corpus, table: SampleTable, columns: list[str]) -> Iterator[pa.Table]:
    """Read columns of the sample table in parts of its rows, in order."""
    return read_batches(corpus, table, columns)


def areas(batch: pa.Table) -> np.ndarray:
    """Compute the pixels of pictures as they came, int64; 0 if it is not known."""
    area = pc.multiply(batch["original_width"].cast(pa.int64()), batch["original_height"].cast(pa.int64()))
    return pc.fill_null(area, 0).to_numpy()


def texts(corpus: Corpus, table: SampleTable, column: str, lines: np.ndarray) -> pa.Array:
    """Take a column of the sample table at these lines, in one pass."""
    wanted, back = np.unique(lines, return_inverse=True)
    parts: list[pa.ChunkedArray] = [pa.chunked_array([], pa.string())]
    number = 0
    for batch in batches(corpus, table, [column]):
        inside = wanted[np.searchsorted(wanted, number) : np.searchsorted(wanted, number + len(batch))]
        parts.append(batch[column].take(pa.array(inside - number)))
        number += len(batch)
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string()).take(pa.array(back))


def write_rows(
    corpus: Corpus, table: SampleTable, path: Path, lines: np.ndarray, columns: list[Any], prefix: str
) -> int:
    """Write the table of a job; returns its number of rows.

    Args:
        lines: of the sample table, in order, from which source, shard and row are taken.
        columns: the job's own, in the order of `JOB_COLUMNS`.
        prefix: of their names.
    """
    fields = [field for field in JOB_COLUMNS if field.name.startswith(prefix)]
    values = pa.table(columns, schema=pa.schema(fields))
    number = done = 0
    with pq.ParquetWriter(path, pa.schema([*ROW_ID, *fields]), compression="zstd") as writer:
        for batch in batches(corpus, table, [field.name for field in ROW_ID]):
            end = int(np.searchsorted(lines, number + len(batch)))
            if end > done:
                part = batch.take(pa.array(lines[done:end] - number))
                rows = values.slice(done, end - done)
                for field in fields:
                    part = part.append_column(field, rows[field.name])
                writer.write_table(part)
            number, done = number + len(batch), end
    return done


def write_groups(
    corpus: Corpus,
    table: SampleTable,
    path: Path,
    lines: np.ndarray,
    groups: KeptGroups,
    columns: list[Any],
    prefix: str,
) -> int:
    """Write a line for each member of a group: the id of the one that is kept, `columns`, and whether it is that one.

    Args:
        lines: of the sample table, of each sample that was compared.
        columns: what is said of each member beside.
        prefix: of the names.
    """
    ids = texts(corpus, table, "id", lines[groups.kept])
    keep = pa.array(groups.kept == groups.members)
    return write_rows(corpus, table, path, lines[groups.members], [ids, *columns, keep], prefix)
