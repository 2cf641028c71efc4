"""The samples of several columns joined by row: the rows of a selection that are ok in every one of them."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import ShardId
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.tables.status_table import read_ok_rows


@dataclass(frozen=True)
class SampleIndex:
    """Samples by shard and row: `shard` (int32, N) counts in `shards`; ordered by source, shard and row."""

    shards: list[ShardId]
    shard: np.ndarray
    row: np.ndarray
    weight: np.ndarray | None = None
    """Weights relative to their mean (float32, N); None if all are equal."""

    def __len__(self) -> int:
        return len(self.row)

    def locate(self, i: int) -> tuple[ShardId, int]:
        """Return shard and row of sample `i`."""
        return self.shards[self.shard[i]], int(self.row[i])

    def name(self, i: int) -> str:
        (source, shard), row = self.locate(i)
        return f"{source}/{shard}/{row}"

    def by_shard(self) -> dict[ShardId, list[int]]:
        """Group the rows by shard, without shards that have none; shards and rows ascend."""
        rows: dict[ShardId, list[int]] = {}
        for shard, row in zip(self.shard.tolist(), self.row.tolist(), strict=True):
            rows.setdefault(self.shards[shard], []).append(row)
        return rows

    def take(self, keep: np.ndarray) -> "SampleIndex":
        """Keep the samples at these positions, or where this is true."""
        weight = None if self.weight is None else self.weight[keep]
        return SampleIndex(self.shards, self.shard[keep], self.row[keep], weight)

    def mixed(self, mix: Mapping[str, float]) -> "SampleIndex":
        """Multiply the weights by their source's in `mix`, 1 if it is not there.

        Raises:
            RequestError: `mix` names a source of which there is no sample.
        """
        sources = [source for source, _ in self.shards]
        present = {sources[number] for number in np.unique(self.shard).tolist()}
        if unknown := sorted(mix.keys() - present):
            raise RequestError(
                f"mix: there is no sample of {', '.join(unknown)}; the sources are {', '.join(sorted(present))}"
            )
        factor = np.array([mix.get(source, 1.0) for source in sources], dtype=np.float32)[self.shard]
        weight = factor if self.weight is None else self.weight * factor
        return replace(self, weight=None if (weight == weight[0]).all() else weight)

    def hashes(self, seed: int) -> np.ndarray:
        """Hash each sample (uint64): a function of nothing but the seed, its shard's name and its row."""
        starts = [
            int.from_bytes(hashlib.sha256(f"{seed}/{source}/{shard}".encode()).digest()[:8])
            for source, shard in self.shards
        ]
        return splitmix(self.row.astype(np.uint64), np.array(starts, dtype=np.uint64)[self.shard])

    def lowest(self, count: int, seed: int) -> np.ndarray:
        """Draw `count` samples by a seed, those of the lowest hashes: their positions, ascending."""
        return lowest(self.hashes(seed), count)

    @cached_property
    def digest(self) -> str:
        """A hash of the samples, by name, and of their weights."""
        digest = hashlib.sha256()
        bounds = np.searchsorted(self.shard, np.arange(len(self.shards) + 1))
        for (source, shard), start, end in zip(self.shards, bounds, bounds[1:], strict=False):
            if end > start:
                digest.update(f"{source}/{shard}\n".encode() + self.row[start:end].astype("<i4").tobytes())
        if self.weight is not None:
            digest.update(self.weight.astype("<f4").tobytes())
        return digest.hexdigest()[:16]


def lowest(hashes: np.ndarray, count: int) -> np.ndarray:
    """Find the positions of the `count` lowest hashes, ascending; of equal ones the first."""
    if not 0 < count < len(hashes):
        return np.arange(min(count, len(hashes)))
    last = np.partition(hashes, count - 1)[count - 1]
    below = np.flatnonzero(hashes < last)
    return np.sort(np.concatenate([below, np.flatnonzero(hashes == last)[: count - len(below)]]))


def splitmix(number: np.ndarray, start: np.ndarray | np.uint64) -> np.ndarray:
    """Compute the `number`-th outputs (uint64) of the generators splitmix64 that begin at `start`."""
    x = start + number * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def index_samples(
    corpus: Corpus, columns: Mapping[str, Mapping[ShardId, Commit]], selection: str | None = None
) -> tuple[SampleIndex, int]:
    """Index the samples that are kept and ok in every column, and count the kept ones that are not.

    Without a selection all rows of shards that every column has are kept.

    Raises:
        RequestError: no such selection, none of its samples can be had, or a sidecar cannot be read.
    """
    kept = None if selection is None else selected_rows(corpus, selection)
    return join_samples(columns, lambda column, shard: read_ok_rows(corpus, columns[column][shard])[0], selection, kept)


def join_samples(
    columns: Mapping[str, Collection[ShardId]],
    ok_rows: Callable[[str, ShardId], np.ndarray],
    selection: str | None,
    kept: Mapping[ShardId, tuple[np.ndarray, np.ndarray]] | None,
) -> tuple[SampleIndex, int]:
    """Index samples as `index_samples` does. kept: the rows of the selection; the others are as of `usable_rows`.

    Raises:
        RequestError: none of the samples can be had.
    """
    usable = usable_rows(columns, ok_rows, kept)
    sizes = [len(rows) for rows, _ in usable.values()]
    if not sum(sizes):
        what = f"selection {selection}" if selection else "the corpus"
        raise RequestError(f"{what} has no sample that is ok in all of {', '.join(columns)}")
    index = SampleIndex(
        list(usable),
        np.repeat(np.arange(len(usable), dtype=np.int32), sizes),
        np.concatenate([rows for rows, _ in usable.values()]).astype(np.int32),
        np.concatenate([weights for _, weights in usable.values()]),
    )
    missing = 0 if kept is None else sum(len(rows) for rows, _ in kept.values()) - len(index)
    return index.mixed({}), missing


def selected_rows(corpus: Corpus, selection: str) -> dict[ShardId, tuple[np.ndarray, np.ndarray]]:
    """Read the rows (int32) and weights (float32) of a selection, by shard. Raises as `load_selection`."""
    from microdit.pipeline.selection import selections  # it brings duckdb

    return selections.selected_rows(corpus, selection)


def usable_rows(
    columns: Mapping[str, Collection[ShardId]],
    ok_rows: Callable[[str, ShardId], np.ndarray],
    selected: Mapping[ShardId, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[ShardId, tuple[np.ndarray, np.ndarray]]:
    """Find the rows that are ok in every column, and their weights, by shard; shards and rows ascend.

    columns: the shards of each. ok_rows: tells which rows of a column's shard are ok (bool).
    selected: what `selected_rows` gives; without it all rows of the shards that every column has, with weight 1.
    """

    def usable(shard: ShardId) -> tuple[np.ndarray, np.ndarray]:
        ok = np.logical_and.reduce([ok_rows(column, shard) for column in columns])
        if selected is None:
            return np.flatnonzero(ok), np.ones(ok.sum(), dtype=np.float32)
        rows, weights = selected[shard]
        use = (rows < len(ok)) & ok[np.minimum(rows, len(ok) - 1)]
        return rows[use], weights[use]

    shards = shared_shards(columns, selected)
    return dict(zip(shards, threaded(usable, shards), strict=True))


def shared_shards(
    columns: Mapping[str, Collection[ShardId]], selected: Collection[ShardId] | None = None
) -> list[ShardId]:
    """List the shards that every column has, and the selection if there is one; they ascend."""
    shards = sorted(set.intersection(*(set(own) for own in columns.values())))
    return shards if selected is None else [shard for shard in shards if shard in selected]


def largest_scalar(
    corpus: Corpus, commits: Mapping[ShardId, Commit], index: SampleIndex, scalar: str
) -> tuple[int, str] | None:
    """Find the largest value of a sidecar's column among samples, and the sample; None if no sidecar has it."""
    bounds = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))

    def largest(number: int) -> tuple[int, int] | None:
        start, end = bounds[number : number + 2]
        if start == end or scalar not in (table := corpus.sidecar(commits[index.shards[number]])).column_names:
            return None
        values = table[scalar].fill_null(0).to_numpy()[index.row[start:end]]
        return int(values.max()), int(start + values.argmax())

    found = [one for one in threaded(largest, range(len(index.shards))) if one is not None]
    return None if not found else (max(found)[0], index.name(max(found)[1]))


def read_captions(corpus: Corpus, text: str, index: SampleIndex) -> list[str]:
    """Read the captions that a text column was made of, of samples, in the index' order."""
    column = f"captions/{text.partition('@')[2]}"
    commits = newest_commits(corpus, [column])[column]
    tables = {shard: corpus.sidecar(commits[shard])["caption"].to_pylist() for shard in index.by_shard()}
    return [tables[shard][row] for shard, rows in index.by_shard().items() for row in rows]
