"""The table job over embeddings: which samples show the same thing, though their pixels differ.

Vectors of unit length are near if their cosine is at least the similarity asked for. To compare each with all would
take weeks for tens of millions; so they are clustered (spherical k-means by faiss, trained on a sample), and compared
within clusters alone, as SemDeDup does (arXiv 2303.09540); here each one belongs to its two nearest clusters. A pair
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
from microdit.pipeline.corpus.names import COMMIT
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import read_rows
from microdit.pipeline.curation.hamming import Forest
from microdit.pipeline.curation.job import (
    EMBEDDING,
    SEMANTIC,
    Job,
    batches,
    is_embedding,
    job_base,
    keepers,
    made,
    texts,
    write_rows,
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


class SemanticTable(Job):
    column: str
    similarity: float
    without_embedding: int
    """Samples that are ok and have none, because the column is not made yet or failed."""
    groups: int
    clusters: int
    cut: int
    """Vectors in clusters that were too large to be compared as one, summed over the clusters."""

    @property
    def present(self) -> str:
        return f"has_{re.sub('[^A-Za-z0-9_]', '_', self.column)}"

    def asked(self) -> dict[str, Any]:
        return {"column": self.column, "similarity": self.similarity}


@dataclass(frozen=True)
class Embedded:
    """The samples of a corpus that have an embedding, in the order of the sample table."""

    place: np.ndarray
    """(n,) int64: which line of the sample table."""
    vectors: np.ndarray
    """(n, width) float16, in a file"""
    area: np.ndarray
    """(n,) int64: pixels of the picture as it came."""
    without: int


def dedup_semantic(corpus: Corpus, column: str | None = None, similarity: float = 0.95) -> dict[str, Any]:
    """Group the samples whose embeddings are linked by steps of at least this cosine; at once if it was done.

    Of a group the sample with the largest picture, as it came, is kept, of several the first one in the order of the
    sample table. Another column or similarity replaces the table.

    Args:
        column: `scores/embedding` or `scores/embedding-<name>`; it need not be said if there is one.

    Returns:
        dict: `samples` (with an embedding) = `kept` + `dropped`; `groups` (of two or more); `without_embedding`;
        `column`; `similarity`; `path` of the table; `clusters`; `cut`.

    Raises:
        RequestError: there is no such column, or several and none is said; the similarity is out of bounds; an
            embedding is damaged; or the temporary folder has too little room.
    """
    if not 0 < similarity <= 1:
        raise RequestError(f"similarity {similarity:g}: expected a cosine above 0, 1 at most, e.g. 0.95")
    column = _column(corpus, column)
    table = sample_table(corpus)
    base = job_base(SEMANTIC, table)
    found = made(corpus, base, SemanticTable, lambda job: (job.column, job.similarity) == (column, similarity))
    if found is None:
        with tempfile.TemporaryDirectory(prefix="microdit-semantic-") as folder:
            found = _find(corpus, table, base, column, similarity, Path(folder) / "vectors")
    dropped = found.rows - found.groups
    return {
        "path": found.object.name,
        **found.asked(),
        "samples": found.samples,
        "without_embedding": found.without_embedding,
        "groups": found.groups,
        "dropped": dropped,
        "kept": found.samples - dropped,
        "clusters": found.clusters,
        "cut": found.cut,
    }


def _find(corpus: Corpus, table: SampleTable, base: str, column: str, similarity: float, spill: Path) -> SemanticTable:
    embedded = _embedded(corpus, table, column, spill)
    labels, clusters, cut = groups(embedded.vectors, similarity)
    keeper, size = keepers(labels, embedded.area)
    members = np.flatnonzero(size > 1)
    kept = keeper[members]

    def write(path: Path) -> int:
        ids = texts(corpus, table, "id", embedded.place[kept])
        away = _cosines(embedded.vectors, members, kept)
        columns = [ids, pa.array(away, pa.float32()), pa.array(kept == members)]
        return write_rows(corpus, table, path, embedded.place[members], columns, "semantic_")

    record = partial(
        SemanticTable,
        column=column,
        similarity=similarity,
        samples=len(embedded.place),
        without_embedding=embedded.without,
        groups=int((kept == members).sum()),
        clusters=clusters,
        cut=cut,
    )
    return publish(corpus, base, write, lambda object, rows: record(object=object, rows=rows))


# -- reading -----------------------------------------------------------------------------------------------------------
def _column(corpus: Corpus, column: str | None) -> str:
    there = sorted(name for name in corpus.columns() if is_embedding(name))
    if column in there:
        return str(column)
    if column is None and len(there) == 1:
        return there[0]
    what = f"it has no {column or EMBEDDING}" if column or not there else "it has several embeddings"
    advice = (
        f"give one of: {', '.join(there)}"
        if there
        else f"add `{EMBEDDING}` to the columns of its config and run `microdit build` again"
    )
    raise RequestError(f"corpus {corpus.url}: {what}; {advice}")


def _embedded(corpus: Corpus, table: SampleTable, column: str, spill: Path) -> Embedded:
    """The vectors of the commits that the sample table was made from, spilled shard by shard."""
    begins, areas, ok = _lines(corpus, table)
    commits = [found for name in table.names if (found := COMMIT.fullmatch(name)) and found[1] == column]
    shards = sorted((found[2], found[3], int(found[4])) for found in commits)
    places, width, count = [np.empty(0, np.int64)], 0, 0
    with spill.open("wb") as file:
        for where, (rows, vectors) in zip(
            shards, threaded(lambda shard: _read(corpus, corpus.commit(column, *shard)), shards, 4), strict=True
        ):
            if not len(rows):
                continue
            if not width:
                width = vectors.shape[1]
                _check_room(spill.parent, 2 * width * ok)
            if vectors.shape[1] != width:
                raise RequestError(
                    f"{column}: shard {where[1]} of source {where[0]} has vectors of {vectors.shape[1]} numbers, those "
                    f"before it {width}; run `microdit verify`"
                )
            file.write(vectors.tobytes())
            places.append(begins[where[:2]] + rows)
            count += len(rows)
    place = np.concatenate(places)
    vectors = np.memmap(spill, np.float16, "r", shape=(count, width)) if count else np.empty((0, 1), np.float16)
    return Embedded(place, vectors, areas[place], ok - count)


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise RequestError(
            f"{folder.parent}: {free / 1e9:.1f} GB are free, the embeddings take up to {wanted / 1e9:.1f} GB "
            "while they are compared; set TMPDIR to a folder on a larger disk"
        )


def _lines(corpus: Corpus, table: SampleTable) -> tuple[dict[tuple[str, str], int], np.ndarray, int]:
    """The first line of each shard in the sample table; (lines,) areas of the pictures; how many samples are ok."""
    begins: dict[tuple[str, str], int] = {}
    areas, ok, number = [np.empty(0, np.int64)], 0, 0
    for batch in batches(corpus, table, ["source", "shard", "status", "original_width", "original_height"]):
        names = pc.binary_join_element_wise(batch["source"], batch["shard"], "/").to_numpy()
        for at in np.flatnonzero(np.append(True, names[1:] != names[:-1])).tolist():
            source, _, shard = names[at].partition("/")
            begins.setdefault((source, shard), number + at)
        area = pc.multiply(batch["original_width"].cast(pa.int64()), batch["original_height"].cast(pa.int64()))
        areas.append(pc.fill_null(area, 0).to_numpy())
        ok += pc.sum(pc.equal(batch["status"], "ok")).as_py() or 0
        number += len(batch)
    return begins, np.concatenate(areas), ok


def _read(corpus: Corpus, commit: Commit) -> tuple[np.ndarray, np.ndarray]:
    """One shard: (k,) rows and (k, width) float16 vectors.

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
    """Which of (n, width) vectors of unit length belong together; the same vectors give the same answer.

    Returns:
        (n,) int64, the smallest index that a vector is linked to; the number of clusters; `SemanticTable.cut`.
    """
    forest, cut = Forest(len(vectors)), 0
    members, ends = _clusters(vectors)
    begins = np.append(0, ends[:-1])
    full = [(int(begin), int(end)) for begin, end in zip(begins, ends, strict=True) if end - begin > 1]
    for some, found in read_ahead(((some, _unit(vectors[some])) for some in (members[b:e] for b, e in full)), 1):
        for part in _pieces(found):
            forest.join(some[part], some[part[_linked(found[part], similarity)]])
        cut += len(some) if len(some) > LARGEST else 0
    return forest.labels(), len(ends), cut


def _unit(vectors: np.ndarray) -> np.ndarray:
    exact = vectors.astype(np.float32)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


def _clusters(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The members of all clusters, one cluster behind the other, each in ascending order; and where each one ends."""
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
    """The places of a cluster's vectors in pieces of `LARGEST`, which overlap by half if there are several.

    Vectors near each other are about as near to the mean: they are ordered by that.
    """
    if len(vectors) <= LARGEST:
        yield np.arange(len(vectors))
        return
    order = np.argsort(vectors @ vectors.mean(0), kind="stable")
    for start in range(0, len(order) - LARGEST // 2, LARGEST // 2):
        yield order[start : start + LARGEST]


def _linked(vectors: np.ndarray, similarity: float) -> np.ndarray:
    """For each vector the smallest place that it is linked to, each compared with each."""
    forest = Forest(len(vectors))
    for start in range(0, len(vectors), BLOCK):
        labels = forest.labels()
        near = vectors[start : start + BLOCK] @ vectors[start:].T >= similarity
        near &= labels[start : start + BLOCK, None] != labels[start:]  # a thousand white pages are linked soon
        ones, others = np.nonzero(near)
        forest.join(ones + start, others + start)
    return forest.labels()


def _cosines(vectors: np.ndarray, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of pairs of vectors, (p,) float32."""
    found = np.empty(len(ones), np.float32)
    for start in range(0, len(ones), PART):
        part = slice(start, start + PART)
        found[part] = (_unit(vectors[ones[part]]) * _unit(vectors[others[part]])).sum(1)
    return np.minimum(found, 1)
