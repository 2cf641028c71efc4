"""Near-duplicate search among millions of 64-bit hashes: multi-index hashing by Hamming distance, in bounded memory.

The 64 bits are cut into m blocks. Two hashes at most d bits apart agree wholly in at least m - d blocks (pigeonhole),
so for each choice of m - d blocks (a table) the hashes are sorted by those bits, and only those that agree in them (a
bucket) are compared.

Real hashes are skewed: drawings on white, flat colours. Equal hashes are merged first. Bits that are nearly always the
same are dealt to all blocks evenly, and m is chosen by how often a sample of the hashes collides. Hashes that are
linked already are not compared again, so that a thousand white pages cost little; a hash is compared with the next
`WINDOW` others of its bucket at most, and the hashes that have more are counted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from microdit.pipeline.base.threads import threaded

MAX_DISTANCE = 8
WINDOW = 512  # others of its bucket that a hash is compared with
DENSE_TABLES, DENSE_WINDOW = 8, 4  # of the first round, which links dense groups
ROUND = 4  # tables of the first whole round; each other one has twice as many
CHUNK = 1 << 18  # hashes at a time: a few megabytes
PAIRS = 1 << 18  # compared at a time
SAMPLE = 1 << 18  # hashes that the number of blocks is chosen by
MORE_BLOCKS = 5  # blocks that agree, at most
SORT_COST, PAIR_COST = 100.0, 5.0  # nanoseconds, about: to move and sort a hash, to compare two
BitFields = Sequence[tuple[int, int]]  # of a hash, from its top: (lowest bit, number of bits)


@dataclass(frozen=True)
class Groups:
    """Result of `groups`."""

    labels: np.ndarray
    """(n,) integers: the smallest index that a hash is linked to."""
    cut: int
    """How many hashes had more others in their bucket, not yet linked to them, than were compared; over all tables."""
    tables: int
    """How many choices of blocks there are."""


def groups(hashes: np.ndarray, distance: int, threads: int = 2) -> Groups:
    """Group (n,) uint64 hashes that are linked by steps of at most `distance` bits.

    Raises:
        ValueError: the distance is not within 0 to `MAX_DISTANCE`.
    """
    _check(hashes, distance)
    dealt, blocks = _plan(hashes, len(hashes) / 2, distance)
    small = index_type(len(hashes))
    values, first, inverse = np.unique(dealt, return_index=True, return_inverse=True)
    del dealt
    first, inverse = first.astype(small), inverse.astype(small)
    forest, cut = Forest(len(values)), 0
    tables = _tables(len(blocks), distance) if distance and len(values) > 1 else []
    for some, window in _rounds(tables):
        labels = forest.labels()
        order = np.argsort(labels, kind="stable").astype(small)
        search = partial(_pairs_of_table, values[order], labels[order], blocks, distance, window)
        for pairs, more in threaded(search, some, threads, ahead=threads):
            forest.join(*order[pairs])
            cut += more if window == WINDOW else 0
    smallest = np.full(len(values), len(hashes), small)
    roots = forest.labels()
    del forest
    np.minimum.at(smallest, roots, first)
    del first
    return Groups(smallest[roots][inverse].astype(np.int64), cut, len(tables))


def index_type(count: int) -> type[np.signedinteger[Any]]:
    """Choose the integers for indices of so many: half the memory where that is enough."""
    return np.int32 if count < 1 << 31 else np.int64


def nearest(hashes: np.ndarray, others: np.ndarray, distance: int, threads: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Find for each of (n,) uint64 hashes the nearest of (m,) others, at most `distance` bits away, without `WINDOW`.

    Returns:
        (n,) int64, an index into the others or -1; (n,) int16, the distance or -1.

    Raises:
        ValueError: as `groups`.
    """
    _check(hashes, distance)
    _check(others, distance)
    best = Nearest(np.full(len(hashes), -1, np.int64), np.full(len(hashes), distance + 1, np.int16))
    if len(hashes) and len(others):
        dealt, blocks = _plan(np.concatenate([others, hashes]), len(others), distance)
        values, first = np.unique(dealt[: len(others)], return_index=True)
        queries = dealt[len(others) :]
        for chosen in _tables(len(blocks), distance):
            fields, bits = _fields(blocks, chosen)
            moved = _move(values, fields)
            order = np.argsort(moved)
            moved, index = moved[order], first[order]

            def search(start: int, fields=fields, bits=bits, moved=moved, index=index) -> None:
                part = slice(start, start + CHUNK)
                _improve(best.part(part), _move(queries[part], fields), moved, index, bits)

            for _ in threaded(search, range(0, len(queries), CHUNK), threads):
                pass
    best.distance[best.index < 0] = -1
    return best.index, best.distance


@dataclass(frozen=True)
class Nearest:
    """The nearest hashes so far: (n,) int64 `index` of each, or -1; (n,) int16 `distance`. Changed in place."""

    index: np.ndarray
    distance: np.ndarray

    def part(self, part: slice) -> "Nearest":
        """View a slice of the hashes."""
        return Nearest(self.index[part], self.distance[part])


class Forest:
    """Union-find over 0 to n - 1, many links at a time; the root of a tree is its smallest member."""

    def __init__(self, count: int):
        self._parent = np.arange(count, dtype=index_type(count))

    def join(self, ones: np.ndarray, others: np.ndarray) -> None:
        """Link the members of each pair."""
        while len(ones):
            ones, others = self._roots(ones), self._roots(others)
            apart = ones != others
            ones, others = ones[apart], others[apart]
            np.minimum.at(self._parent, np.maximum(ones, others), np.minimum(ones, others))

    def labels(self) -> np.ndarray:
        """Return the root of every member."""
        return self._roots(np.arange(len(self._parent), dtype=self._parent.dtype))

    def _roots(self, members: np.ndarray) -> np.ndarray:
        roots = self._parent[members]
        while not np.array_equal(above := self._parent[roots], roots):
            roots = above
        self._parent[members] = roots
        return roots


def _check(hashes: np.ndarray, distance: int) -> None:
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance {distance}: expected 0 to {MAX_DISTANCE} bits")
    if hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise ValueError(f"hashes: {hashes.dtype} of shape {hashes.shape}; expected uint64 of one dimension")


# -- blocks of bits ----------------------------------------------------------------------------------------------------
def _plan(hashes: np.ndarray, partners: float, distance: int) -> tuple[np.ndarray, BitFields]:
    """Deal the bits of the hashes to the number of blocks that costs least; returns the hashes so, and the blocks.

    partners: with how many each hash would be compared if there were one block.
    """
    sample = hashes[np.random.default_rng(0).permutation(len(hashes))[:SAMPLE]] if len(hashes) > SAMPLE else hashes
    sample = np.unique(sample)
    ones = [int((sample >> np.uint64(bit) & np.uint64(1)).sum()) for bit in range(64)]
    order = sorted(range(64), key=lambda bit: (abs(2 * ones[bit] - len(sample)), bit))
    cheapest, plan = math.inf, ([(bit, 1) for bit in order], [(0, 64)])
    for count in range(distance + 1, distance + 1 + MORE_BLOCKS) if distance else ():
        dealt = [(bit, 1) for block in range(count) for bit in order[block::count]]
        sizes = [len(order[block::count]) for block in range(count)]
        blocks = [(64 - sum(sizes[: block + 1]), size) for block, size in enumerate(sizes)]
        tables = _tables(count, distance)
        moved, collisions = _move(sample, dealt), 0.0
        for chosen in (tables[0], tables[len(tables) // 2], tables[-1]):
            fields, bits = _fields(blocks, chosen)
            _, bucket_sizes = np.unique(_move(moved, fields) >> np.uint64(64 - bits), return_counts=True)
            collisions += float((bucket_sizes * (bucket_sizes - 1.0)).sum()) / max(1, len(sample)) ** 2 / 3
        cost = len(tables) * (SORT_COST + PAIR_COST * collisions * partners)
        if cost < cheapest:
            cheapest, plan = cost, (dealt, blocks)
    return _move(hashes, plan[0]), plan[1]


def _tables(blocks: int, distance: int) -> list[tuple[int, ...]]:
    """Choose the blocks that agree in every possible way."""
    return list(combinations(range(blocks), blocks - distance))


def _fields(blocks: BitFields, chosen: tuple[int, ...]) -> tuple[list[tuple[int, int]], int]:
    """Order the chosen blocks before the others, neighbours merged; second: how many bits the chosen ones have."""
    rest = [number for number in range(len(blocks)) if number not in chosen]
    fields: list[tuple[int, int]] = []
    for low, bits in (blocks[number] for number in (*chosen, *rest)):
        if fields and fields[-1][0] == low + bits:
            fields[-1] = (low, fields[-1][1] + bits)
        else:
            fields.append((low, bits))
    return fields, sum(blocks[number][1] for number in chosen)


def _move(hashes: np.ndarray, fields: BitFields) -> np.ndarray:
    """Move these bit fields of the hashes side by side, the first one to the top; the result has one dimension."""
    flat = hashes.ravel()
    moved = np.empty_like(flat)
    for start in range(0, len(flat), CHUNK // 4):
        part = flat[start : start + CHUNK // 4]
        made = np.zeros_like(part)
        for low, bits in fields:
            if bits < 64:
                made <<= np.uint64(bits)
            field = part >> np.uint64(low)
            field &= np.uint64((1 << bits) - 1)
            made |= field
        moved[start : start + CHUNK // 4] = made
    return moved


# -- comparing ---------------------------------------------------------------------------------------------------------
def _rounds(tables: list[tuple[int, ...]]) -> Iterator[tuple[list[tuple[int, ...]], int]]:
    """Divide the tables into rounds, each with its window: what a round links, the next ones need not compare.

    The first round takes a few tables with a small window: it links dense groups before anything is compared with
    hundreds of others.
    """
    if tables:
        yield tables[:: -(-len(tables) // DENSE_TABLES)], DENSE_WINDOW
    start, size = 0, ROUND
    while start < len(tables):
        yield tables[start : start + size], WINDOW
        start, size = start + size, 2 * size


def _pairs_of_table(
    values: np.ndarray, labels: np.ndarray, blocks: BitFields, distance: int, window: int, chosen: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """Find near pairs of values that agree in the chosen blocks and differ in their label.

    Each value is compared with the `window` next ones of its bucket at most.

    labels: sorted, so that in each bucket, too, equal ones lie side by side and are skipped.

    Returns:
        (2, p) indices into `values`; how many values had more than `window` to be compared with.
    """
    fields, bits = _fields(blocks, chosen)
    index_bits = max(1, (len(values) - 1).bit_length())  # a packed number: the key, and below it the index
    index_mask = np.uint64((1 << index_bits) - 1)
    packed = _move(values, fields)
    packed >>= np.uint64(max(64 - bits, index_bits + 1))  # of a long key its top is enough
    packed <<= np.uint64(index_bits)
    packed |= np.arange(len(values), dtype=np.uint64)
    packed.sort()
    pairs, cut, start = [np.empty((2, 0), np.int64)], 0, 0
    while start < len(packed):
        end = min(start + CHUNK, len(packed))
        end += int(np.searchsorted(packed[end:], packed[end - 1] | index_mask, "right"))  # whole buckets
        keys, index = packed[start:end] >> np.uint64(index_bits), packed[start:end] & index_mask
        new_key = _changes(keys)
        begins, ends = _ends(new_key | _changes(labels[index])), _ends(new_key)
        partners = ends - begins
        cut += int((partners > window).sum())
        pairs.append(index[_near(values[index], begins, np.minimum(partners, window), distance)].astype(np.int64))
        start = end
    return np.concatenate(pairs, axis=1), cut


def _changes(values: np.ndarray) -> np.ndarray:
    """Mark the last value of each run of equal ones."""
    return np.append(values[1:] != values[:-1], True)


def _ends(changes: np.ndarray) -> np.ndarray:
    """For each value the end of its run."""
    ends = np.flatnonzero(changes) + 1
    return np.repeat(ends, np.diff(ends, prepend=0))


def _near(values: np.ndarray, begins: np.ndarray, partners: np.ndarray, distance: int) -> np.ndarray:
    """Compare each value with its `partners` next ones from its `begins` on; returns near pairs as (2, p) indices."""
    ones = np.flatnonzero(partners)
    begins, partners = begins[ones], partners[ones]
    stops = np.cumsum(partners)
    pairs, done = [np.empty((2, 0), np.int64)], 0
    while done < len(ones):
        before = stops[done] - partners[done]
        some = slice(done, max(done + 1, int(np.searchsorted(stops, before + PAIRS, "right"))))
        pair_stops = stops[some] - before
        others = np.repeat(begins[some] - pair_stops + partners[some], partners[some])
        others += np.arange(len(others))
        differing = np.repeat(values[ones[some]], partners[some])
        differing ^= values[others]
        near = np.flatnonzero(np.bitwise_count(differing) <= distance)
        if len(near):
            pairs.append(np.stack([ones[some][np.searchsorted(pair_stops, near, "right")], others[near]]))
        done = some.stop
    return np.concatenate(pairs, axis=1)


def _improve(best: Nearest, hashes: np.ndarray, others: np.ndarray, index: np.ndarray, bits: int) -> None:
    """Compare hashes with those of the sorted others that agree in the top bits, and keep what is nearer than `best`.

    index: of each of the others, as `best` has it.
    """
    bucket = np.uint64(1 << (64 - bits))  # numbers that agree in the top bits
    other = np.searchsorted(others, hashes & ~(bucket - np.uint64(1)))
    at = np.arange(len(hashes))
    while True:
        inside = other < len(others)
        at, other = at[inside], other[inside]
        differing = hashes[at] ^ others[other]
        agree = differing < bucket
        at, other, differing = at[agree], other[agree], differing[agree]
        if not len(at):
            return
        away = np.bitwise_count(differing).astype(np.int16)
        better = away < best.distance[at]
        best.distance[at[better]], best.index[at[better]] = away[better], index[other[better]]
        other = other + 1
