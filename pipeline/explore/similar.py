"""Find the samples whose embeddings are nearest to one: an index in memory, bounded, of a sample if there are more."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT
from microdit.pipeline.curation.semantic import read_vectors
from microdit.pipeline.explore.pictures import Members, MissingPicture
from microdit.pipeline.explore.rows import Place

MOST_BYTES = 512 << 20  # of vectors in memory: 350,000 of 768 numbers
THREADS = 4


@dataclass(frozen=True)
class VectorIndex:
    """An index of embeddings (float16) by inner product, and where each one's sample lies."""

    column: str
    index: Any
    shards: list[tuple[str, str]]
    shard: np.ndarray
    """(n,) int32: the number of the shard of each vector in `shards`."""
    row: np.ndarray
    """(n,) int32"""
    of: int
    """Shards that the column has; of those that are not in `shards` nothing is found."""

    @property
    def note(self) -> str | None:
        if len(self.shards) == self.of:
            return None
        return f"of a sample: {len(self.row):,} embeddings, {len(self.shards):,} of {self.of:,} shards of {self.column}"

    def nearest(self, vector: np.ndarray, limit: int) -> list[tuple[Place, float]]:
        """Find the places of the nearest vectors, and their cosines."""
        wanted = vector.astype(np.float32)[None]
        scores, found = self.index.search(wanted / max(float(np.linalg.norm(wanted)), 1e-9), min(limit, len(self.row)))
        return [
            ((*self.shards[self.shard[number]], int(self.row[number])), float(score))
            for score, number in zip(scores[0].tolist(), found[0].tolist(), strict=True)
            if number >= 0
        ]


def build_index(corpus: Corpus, names: Sequence[str], column: str, most: int = MOST_BYTES) -> VectorIndex:
    """Read embeddings into an index; if they are more than `most` bytes, those of evenly spread shards.

    Args:
        names: of the newest commits, sorted.

    Raises:
        RequestError: an embedding is damaged.
    """
    import faiss

    matches = [match for name in names if (match := COMMIT.fullmatch(name)) and match[1] == column]
    shards = sorted((match[2], match[3], int(match[4])) for match in matches)
    if not shards:
        raise RequestError(f"column {column}: corpus {corpus.url} has no shard of it; build it first")
    order = _spread(len(shards))
    taken: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    size = 0
    reading = threaded(lambda n: read_vectors(corpus, corpus.commit(column, *shards[n])), order, THREADS)
    for number, (rows, vectors) in zip(order, reading, strict=False):
        if size + vectors.nbytes > most and taken:
            break
        taken[number] = rows, vectors
        size += vectors.nbytes
    numbers = [number for number in sorted(taken) if len(taken[number][0])]
    width = taken[numbers[0]][1].shape[1] if numbers else 1
    index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for number in numbers:
        index.add(taken[number][1].astype(np.float32))
    counts = [len(taken[number][0]) for number in numbers]
    return VectorIndex(
        column,
        index,
        [shards[number][:2] for number in numbers],
        np.repeat(np.arange(len(numbers), dtype=np.int32), counts),
        np.concatenate([np.empty(0, np.int64), *(taken[number][0] for number in numbers)]).astype(np.int32),
        len(shards) if len(taken) < len(shards) else len(numbers),
    )


def _spread(count: int) -> list[int]:
    """Order numbers so that every beginning of them is about evenly spread."""
    bits = max(count - 1, 1).bit_length()
    turned = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits))
    return [number for number in turned if number < count]


def vector_of(members: Members, column: str, at: Place) -> np.ndarray:
    """Read the embedding of a sample; raises MissingPicture if it has none."""
    data, _ = members.read(column, at)
    try:
        vector = array_from_bytes(data)
        if vector.ndim != 1:
            raise ValueError(f"it has the shape {vector.shape}")
        return vector
    except ValueError as error:
        raise MissingPicture(f"{column}, shard {at[1]}, row {at[2]}: its embedding cannot be read ({error})") from None
