"""The rows of a selection in 12 bytes each, sorted and checked; written and read in parts, as their hash needs them."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from microdit.pipeline.corpus.names import ShardId

SELECTION = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)
PART = 1 << 20  # rows of a row group of the file
LINES = 1 << 16  # rows that are hashed at a time
ROW_BITS = 32


@dataclass(frozen=True)
class ChosenRows:
    """Rows ordered by source, shard and row."""

    shards: list[ShardId]
    """Sorted."""
    key: np.ndarray
    """(n,) int64, ascending: the number of the shard in `shards`, and in the low 32 bits the row."""
    weight: np.ndarray
    """(n,) float32"""

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def of(cls, table: pa.Table) -> "ChosenRows":
        """Sort the rows of a table that has the columns of `SELECTION`."""
        known: dict[ShardId, int] = {}
        parts = [_keys(batch, known, grow=True) for batch in table.to_batches()]
        key = np.concatenate([np.empty(0, np.int64), *parts])
        del parts
        shards = sorted(known)
        rank = np.empty(len(shards), np.int64)
        rank[[known[shard] for shard in shards]] = np.arange(len(shards)) << ROW_BITS
        key = rank[key >> ROW_BITS] | (key & ((1 << ROW_BITS) - 1))
        weight = table["weight"].to_numpy()
        if not (key[1:] >= key[:-1]).all():
            order = np.argsort(key, kind="stable")
            key, weight = key[order], weight[order]
        return cls(shards, key, weight)

    @property
    def double(self) -> bool:
        """Tell if a row is there twice."""
        return bool((self.key[1:] == self.key[:-1]).any())

    def all_in(self, samples: Iterable[pa.RecordBatch]) -> bool:
        """Tell whether each row, none of which is double, is among these (`source`, `shard`, `row`)."""
        known = {shard: number for number, shard in enumerate(self.shards)}
        found = np.zeros(len(self), bool)
        for batch in samples:
            keys = _keys(batch, known)
            at = np.minimum(np.searchsorted(self.key, keys), len(self) - 1)
            found[at[self.key[at] == keys]] = True
        return bool(found.all())

    @property
    def sources(self) -> pa.DictionaryArray:
        """The source of each row."""
        names = sorted({source for source, _ in self.shards})
        number = np.array([names.index(source) for source, _ in self.shards], np.int32)
        return pa.DictionaryArray.from_arrays(number[self.key >> ROW_BITS], names)

    def parts(self) -> Iterator[pa.Table]:
        """Give the rows as tables of `PART` rows."""
        sources, shards = (pa.array([shard[at] for shard in self.shards], pa.string()) for at in range(2))
        for start in range(0, len(self), PART):
            key = self.key[start : start + PART]
            number = pa.array(key >> ROW_BITS)
            row = (key & ((1 << ROW_BITS) - 1)).astype(np.int32)
            arrays = [sources.take(number), shards.take(number), pa.array(row)]
            yield pa.table([*arrays, pa.array(self.weight[start : start + PART])], schema=SELECTION)


def _keys(batch: pa.RecordBatch, known: dict[ShardId, int], grow: bool = False) -> np.ndarray:
    """Join each row's number to its shard's in `known`, (n,) int64; of shards that are not there -1, or a new one."""
    source, shard = (pc.dictionary_encode(batch[name]) for name in ("source", "shard"))
    count = len(shard.dictionary)
    pair = source.indices.to_numpy().astype(np.int64) * count + shard.indices.to_numpy()
    heads = np.flatnonzero(np.append(True, pair[1:] != pair[:-1])[: len(pair)])  # rows of a shard lie together, mostly
    pairs, first, inverse = np.unique(pair[heads], return_index=True, return_inverse=True)
    sources, shards = source.dictionary.to_pylist(), shard.dictionary.to_pylist()
    names = [(sources[number // count], shards[number % count]) for number in pairs.tolist()]
    for at in np.argsort(first).tolist() if grow else ():
        known.setdefault(names[at], len(known))
    numbers = np.array([known.get(name, -1) for name in names], np.int64)
    number = np.repeat(numbers[inverse], np.diff(heads, append=len(pair)))
    return (number << ROW_BITS) | batch["row"].to_numpy().astype(np.uint32)


def rows_by_shard(parts: Iterable[pa.Table]) -> dict[ShardId, tuple[np.ndarray, np.ndarray]]:
    """Collect rows (int32) and weights (float32) by shard, of tables that are ordered as a selection is."""
    known: dict[ShardId, int] = {}
    numbers, rows, weights = [], [], []
    for part in parts:
        for batch in part.to_batches():
            numbers.append((_keys(batch, known, grow=True) >> ROW_BITS).astype(np.int32))
            rows.append(batch["row"].to_numpy())
            weights.append(batch["weight"].to_numpy())
    if not known:
        return {}
    starts = np.searchsorted(np.concatenate(numbers), np.arange(1, len(known)))
    del numbers
    by_shard = (np.split(np.concatenate(values), starts) for values in (rows, weights))
    return dict(zip(known, zip(*by_shard, strict=True), strict=True))


class SelectionHash:
    """The hash of a selection (docs/reference/corpus.md, section 6), of its metadata and of its rows in parts."""

    def __init__(self, about: bytes):
        self._digest = hashlib.sha256(about + b"\n")

    def update(self, part: pa.Table) -> None:
        """Add the next rows, in order."""
        for batch in part.to_batches(max_chunksize=LINES):
            weights = pc.dictionary_encode(batch["weight"])
            ends = pa.array([f"{weight:.9g}\n" for weight in weights.dictionary.to_pylist()], pa.string())
            names = [pc.cast(batch[name], pa.string()) for name in ("source", "shard", "row")]
            lines = pc.binary_join_element_wise(*names, ends.take(weights.indices), "\t")
            _, offsets, data = lines.buffers()
            if len(lines):
                bounds = np.frombuffer(offsets, np.int32)[[lines.offset, lines.offset + len(lines)]]
                self._digest.update(memoryview(data)[bounds[0] : bounds[1]])

    def value(self) -> str:
        """Return the first 16 hex digits of the SHA-256."""
        return self._digest.hexdigest()[:16]
