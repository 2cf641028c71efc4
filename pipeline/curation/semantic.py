"""The table job over embeddings: near-duplicates by what they show, though their pixels differ.

Vectors of unit length are near if their cosine is at least the similarity asked for. To compare each with all would
take weeks for tens of millions; so they are clustered (spherical k-means by faiss, trained on a sample), and compared
within clusters alone, as SemDeDup does (arXiv 2303.09540); here each vector belongs to its two nearest clusters. A pair
whose members share no cluster is missed, unless others between them link it.

The vectors lie in one file of the temporary folder: in memory are the training sample, two clusters at a time, and some
50 bytes a sample.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tarfile import TarError
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.threads import read_ahead, threaded
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, ShardId
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import read_rows
from microdit.pipeline.curation.greedy import nearest_kept
from microdit.pipeline.curation.hamming import Forest
from microdit.pipeline.curation.job import (
    EMBEDDING,
    SEMANTIC,
    Grouped,
    GroupsTable,
    areas,
    batches,
    cached_job,
    is_embedding,
    job_base,
    write_groups,
)
from microdit.pipeline.tables.published import publish
from microdit.pipeline.tables.sample_table import SampleTable, sample_table

CLUSTER = 2048  # vectors of a cluster, about, each vector in one
NEAREST = 2  # clusters of a vector
LARGEST = 8192  # vectors that are compared with each other at a time
TRAINING = 64  # vectors of the training sample for each cluster, about
TRAINING_BYTES = 1 << 30
ROUNDS = 10  # of k-means
PART = 1 << 16  # vectors at a time
BLOCK = 256  # of a cluster's vectors, compared with all of it at a time
SEED = 0
ROUNDING = 1e-6  # of a cosine in float32: equal vectors have 1 in any order of the sum
METHOD = 2  # 1: groups by chains of links


class SemanticTable(GroupsTable):
    """The record of `dedup_semantic`; `cut` counts vectors in clusters that were too large to be compared as one."""

    column: str
    similarity: float
    """The least cosine of a link."""
    without_embedding: int
    """Samples that are ok and have no embedding, because the column is not made yet or failed."""
    clusters: int

    @property
    def present(self) -> str:
        return f"has_{re.sub('[^A-Za-z0-9_]', '_', self.column)}"

    def asked(self) -> dict[str, Any]:
        return {"column": self.column, "similarity": self.similarity}


@dataclass(frozen=True)
class SemanticDeduplication(Grouped):
    """Result of `dedup_semantic`; `samples` have an embedding."""

    column: str
    similarity: float
    without_embedding: int
    clusters: int


@dataclass(frozen=True)
class Embedded:
    """The samples of a corpus that have an embedding, in the order of the sample table."""

    line: np.ndarray
    """(n,) int64: the line of the sample table."""
    vectors: np.ndarray
    """(n, width) float16, in a file"""
    area: np.ndarray
    """(n,) int64: pixels of the picture as it came."""
    without: int
    """Samples that are ok and have no embedding."""


def dedup_semantic(corpus: Corpus, column: str | None = None, similarity: float = 0.95) -> SemanticDeduplication:
    """Drop the samples whose embeddings have at least this cosine with that of a sample that is kept.

    Of samples near each other the one with the largest picture, as it came, is kept, of several the first one in the
    order of the sample table (`nearest_kept`). Returns immediately if the table exists; another column or similarity
    replaces it.

    Args:
        column: `scores/embedding` or `scores/embedding-<name>`; None if the corpus has just one.

    Raises:
        RequestError: there is no such column, or several and none is given; the similarity is out of bounds; an
            embedding is damaged; or the temporary folder has too little room.
    """
    if not 0 < similarity <= 1:
        raise RequestError(f"similarity {similarity:g}: expected a cosine above 0, 1 at most, e.g. 0.95")
    column = _column(corpus, column)
    table = sample_table(corpus)
    base, asked = job_base(SEMANTIC, table), (column, similarity, METHOD)
    job = cached_job(corpus, table, base, SemanticTable, lambda job: (job.column, job.similarity, job.method) == asked)
    if job is None:
        with tempfile.TemporaryDirectory(prefix="microdit-semantic-") as folder:
            job = _run(corpus, table, base, column, similarity, Path(folder) / "vectors")
    names = ("column", "similarity", "without_embedding", "clusters")
    return SemanticDeduplication(**job.counts, **{name: getattr(job, name) for name in names})


def _run(corpus: Corpus, table: SampleTable, base: str, column: str, similarity: float, spill: Path) -> SemanticTable:
    """Run the job and publish its table; the vectors are spilled to a file."""
    embedded = _embedded(corpus, table, column, spill)
    labels, clusters, cut = groups(embedded.vectors, similarity)
    chosen = nearest_kept(labels, embedded.area, partial(similar, embedded.vectors, similarity))
    cosines = _cosines(embedded.vectors, chosen.members, chosen.kept)

    def write(path: Path) -> int:
        columns = [pa.array(np.minimum(cosines, 1), pa.float32())]
        return write_groups(corpus, table, path, embedded.line, chosen, columns, "semantic_")

    record = partial(
        SemanticTable,
        column=column,
        similarity=similarity,
        samples=len(embedded.line),
        without_embedding=embedded.without,
        clusters=clusters,
        cut=cut,
        beyond=int((cosines < similarity - ROUNDING).sum()),
        method=METHOD,
        groups=chosen.count,
        largest=chosen.largest,
    )
    return publish(corpus, base, write, lambda object, rows: record(object=object, rows=rows))


# -- reading -----------------------------------------------------------------------------------------------------------
def _column(corpus: Corpus, column: str | None) -> str:
    """Check the column that is asked for, or choose the only one."""
    available = sorted(name for name in corpus.columns() if is_embedding(name))
    if column in available:
        return str(column)
    if column is None and len(available) == 1:
        return available[0]
    what = f"it has no {column or EMBEDDING}" if column or not available else "it has several embeddings"
    advice = (
        f"give one of: {', '.join(available)}"
        if available
        else f"add `{EMBEDDING}` to the columns of its config and run `microdit build` again"
    )
    raise RequestError(f"corpus {corpus.url}: {what}; {advice}")


def _embedded(corpus: Corpus, table: SampleTable, column: str, spill: Path) -> Embedded:
    """Read the vectors of the commits that the sample table was made from, spilled shard by shard."""
    begins, area, ok = _lines(corpus, table)
    commits = [match for name in table.names if (match := COMMIT.fullmatch(name)) and match[1] == column]
    shards = sorted((match[2], match[3], int(match[4])) for match in commits)
    lines, width, count = [np.empty(0, np.int64)], 0, 0
    with spill.open("wb") as file:
        for (source, shard, _), (rows, vectors) in zip(
            shards, threaded(lambda shard: read_vectors(corpus, corpus.commit(column, *shard)), shards, 4), strict=True
        ):
            if not len(rows):
                continue
            if not width:
                width = vectors.shape[1]
                _check_room(spill.parent, 2 * width * ok)
            if vectors.shape[1] != width:
                raise RequestError(
                    f"{column}: shard {shard} of source {source} has vectors of {vectors.shape[1]} numbers, those "
                    f"before it {width}; run `microdit verify`"
                )
            file.write(vectors.tobytes())
            lines.append(begins[source, shard] + rows)
            count += len(rows)
    line = np.concatenate(lines)
    vectors = np.memmap(spill, np.float16, "r", shape=(count, width)) if count else np.empty((0, 1), np.float16)
    return Embedded(line, vectors, area[line], ok - count)


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise RequestError(
            f"{folder.parent}: {free / 1e9:.1f} GB are free, the embeddings take up to {wanted / 1e9:.1f} GB "
            "while they are compared; set TMPDIR to a folder on a larger disk"
        )


def _lines(corpus: Corpus, table: SampleTable) -> tuple[dict[ShardId, int], np.ndarray, int]:
    """Read the first line of each shard in the sample table; (lines,) areas of pictures; the number of ok samples."""
    begins: dict[ShardId, int] = {}
    area, ok, number = [np.empty(0, np.int64)], 0, 0
    for batch in batches(corpus, table, ["source", "shard", "status", "original_width", "original_height"]):
        names = pc.binary_join_element_wise(batch["source"], batch["shard"], "/").to_numpy()
        for at in np.flatnonzero(np.append(True, names[1:] != names[:-1])).tolist():
            source, _, shard = names[at].partition("/")
            begins.setdefault((source, shard), number + at)
        area.append(areas(batch))
        ok += pc.sum(pc.equal(batch["status"], "ok")).as_py() or 0
        number += len(batch)
    return begins, np.concatenate(area), ok


def read_vectors(corpus: Corpus, commit: Commit) -> tuple[np.ndarray, np.ndarray]:
    """Read one shard: (k,) rows and (k, width) float16 vectors.

    Raises:
        RequestError: it is damaged.
    """
    rows: list[int] = []
    vectors: list[np.ndarray] = []
    try:
        for row in read_rows(corpus, commit):
            if row.ok:
                vector = array_from_bytes(row.members["npy"])
                length = np.linalg.norm(vector.astype(np.float32))
                if vector.ndim != 1 or not 0.99 < length < 1.01:
                    raise ValueError(f"row {row.row} has shape {vector.shape} and length {length:.3g}, expected 1")
                rows.append(row.row)
                vectors.append(vector.astype(np.float16))
        return np.array(rows, np.int64), np.stack(vectors) if vectors else np.empty((0, 0), np.float16)
    except (ValueError, KeyError, TarError) as error:
        raise RequestError(f"{commit.object.name}: {first_line(error)}; run `microdit verify`") from None


# -- comparing ---------------------------------------------------------------------------------------------------------
def groups(vectors: np.ndarray, similarity: float) -> tuple[np.ndarray, int, int]:
    """Group (n, width) vectors of unit length that are linked; the same vectors give the same groups.

    Returns:
        (n,) integers, the smallest index that a vector is linked to; the number of clusters; how many were in
        clusters too large to be compared as one.
    """
    forest, cut = Forest(len(vectors)), 0
    members, ends = _clusters(vectors)
    begins = np.append(0, ends[:-1])
    full = [(int(begin), int(end)) for begin, end in zip(begins, ends, strict=True) if end - begin > 1]
    for some, units in read_ahead(((some, _unit(vectors[some])) for some in (members[b:e] for b, e in full)), 1):
        for part in _pieces(units):
            forest.join(some[part], some[part[_linked(units[part], similarity)]])
        cut += len(some) if len(some) > LARGEST else 0
    return forest.labels(), len(ends), cut


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scale float32 copies to unit length, which float16 rounded."""
    exact = vectors.astype(np.float32)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


def _clusters(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cluster the vectors.

    Returns:
        The members of all clusters, one cluster behind the other, each in ascending order; the end of each cluster.
    """
    count, width = vectors.shape
    clusters = max(1, round(count / CLUSTER))
    if clusters == 1:
        return np.arange(count), np.array([count])
    import faiss

    training = min(count, TRAINING * clusters, max(clusters, TRAINING_BYTES // (4 * width)))
    sample = np.sort(np.random.default_rng(SEED).choice(count, training, replace=False))
    means = faiss.Kmeans(
        width,
        clusters,
        niter=ROUNDS,
        seed=SEED,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=training,
    )
    means.train(_unit(vectors[sample]))
    nearest = np.empty((count, NEAREST), np.int32)
    for start in range(0, count, PART):
        nearest[start : start + PART] = means.index.search(_unit(vectors[start : start + PART]), NEAREST)[1]
    order = np.argsort(nearest.ravel(), kind="stable")
    return order // NEAREST, np.cumsum(np.bincount(nearest.ravel(), minlength=clusters))


def _pieces(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Divide the indices of a cluster's vectors into pieces of `LARGEST`, which overlap by half if there are several.

    Vectors near each other are about equally near to the mean: they are ordered by that.
    """
    if len(vectors) <= LARGEST:
        yield np.arange(len(vectors))
        return
    order = np.argsort(vectors @ vectors.mean(0), kind="stable")
    for start in range(0, len(order) - LARGEST // 2, LARGEST // 2):
        yield order[start : start + LARGEST]


def _linked(vectors: np.ndarray, similarity: float) -> np.ndarray:
    """Compare each vector with each; returns for each the smallest index that it is linked to."""
    forest = Forest(len(vectors))
    for start in range(0, len(vectors), BLOCK):
        labels = forest.labels()
        near = vectors[start : start + BLOCK] @ vectors[start:].T >= similarity - ROUNDING
        near &= labels[start : start + BLOCK, None] != labels[start:]  # linked already
        ones, others = np.nonzero(near)
        forest.join(ones + start, others + start)
    return forest.labels()


def similar(vectors: np.ndarray, similarity: float, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compare pairs of vectors; `ones` may be one index."""
    return _cosines(vectors, ones, others) >= similarity - ROUNDING


def _cosines(vectors: np.ndarray, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return cosines of pairs of vectors, (p,) float32; `ones` may be one index."""
    cosines = np.empty(len(others), np.float32)
    one = None if np.ndim(ones) else _unit(vectors[[ones]])
    for start in range(0, len(others), PART):
        part = slice(start, start + PART)
        cosines[part] = ((_unit(vectors[ones[part]]) if one is None else one) * _unit(vectors[others[part]])).sum(1)
    return cosines
