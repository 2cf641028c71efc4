"""Near 64-bit hashes among millions: multi-index look-up by Hamming distance, in numpy and bounded memory.

The 64 bits are cut into m blocks. Two hashes at most d bits apart agree wholly in at least m - d blocks (pigeonhole),
so for each choice of m - d blocks the hashes are sorted by those bits, and only those that agree in them (a bucket) are
compared.

Real hashes are skewed: drawings on white, flat colours. Equal hashes are one. Bits that are nearly always the same are
dealt to all blocks evenly, and m is chosen by how often the hashes at hand collide. What is linked already is not
compared again, so that a thousand white pages cost little; a hash is compared with the next `WINDOW` others of its
bucket alone, and how often that cut something off is told.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from microdit.pipeline.base.threads import threaded

MAX_DISTANCE = 8
WINDOW = 512  # others of its bucket that a hash is compared with
GLANCES, GLANCE = 8, 4  # tables and neighbours of the first look, which is for what is dense
ROUND = 4  # tables of the first whole round; each other one has twice as many
CHUNK = 1 << 18  # hashes at a time: a few megabytes
PAIRS = 1 << 18  # compared at a time
SAMPLE = 1 << 18  # hashes that the number of blocks is chosen by
MORE_BLOCKS = 5  # at most so many blocks agree
SORT_COST, PAIR_COST = 100.0, 5.0  # nanoseconds, about: to move and sort a hash, to compare two
Fields = Sequence[tuple[int, int]]  # of a hash, from its top: (lowest bit, bits)


@dataclass(frozen=True)
class Groups:
    """`labels`, (n,) int64: the smallest index that a hash is linked to. `cut`: how many hashes had more others in
    their bucket, not yet linked to them, than were compared, summed over the `tables` (the choices of blocks)."""

    labels: np.ndarray
    cut: int
    tables: int


def groups(hashes: np.ndarray, distance: int, threads: int = 2) -> Groups:
    """Which of (n,) uint64 hashes belong together: linked by steps of at most `distance` bits.

    Raises:
        ValueError: the distance is not within 0 to `MAX_DISTANCE`.
    """
    _check(hashes, distance)
    dealt, blocks = _plan(hashes, len(hashes) / 2, distance)
    values, first, inverse = np.unique(dealt, return_index=True, return_inverse=True)
    del dealt
    forest, cut = Forest(len(values)), 0
    tables = _tables(len(blocks), distance) if distance and len(values) > 1 else []
    for some, window in _rounds(tables):
        labels = forest.labels()
        order = np.argsort(labels, kind="stable")
        look = partial(_table, values[order], labels[order], blocks, distance, window)
        for pairs, more in threaded(look, some, threads, ahead=threads):
            forest.join(*order[pairs])
            cut += more if window == WINDOW else 0
    smallest = np.full(len(values), len(hashes), np.int64)
    roots = forest.labels()
    np.minimum.at(smallest, roots, first)
    return Groups(smallest[roots][inverse], cut, len(tables))


def nearest(hashes: np.ndarray, others: np.ndarray, distance: int, threads: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """For each of (n,) uint64 hashes the nearest of (m,) others, at most `distance` bits away. Nothing is cut off.

    Returns:
        (n,) int64, an index into the others or -1; (n,) int16, the distance or -1.

    Raises:
        ValueError: as `groups`.
    """
    _check(hashes, distance)
    _check(others, distance)
    found = np.full(len(hashes), -1, np.int64)
    best = np.full(len(hashes), distance + 1, np.int16)
    if len(hashes) and len(others):
        dealt, blocks = _plan(np.concatenate([others, hashes]), len(others), distance)
        values, first = np.unique(dealt[: len(others)], return_index=True)
        mine = dealt[len(others) :]
        for chosen in _tables(len(blocks), distance):
            fields, bits = _fields(blocks, chosen)
            there = _move(values, fields)
            order = np.argsort(there)
            there, index = there[order], first[order]

            def look(start: int, fields=fields, bits=bits, there=there, index=index) -> None:
                part = slice(start, start + CHUNK)
                _nearest(_move(mine[part], fields), there, index, bits, found[part], best[part])

            for _ in threaded(look, range(0, len(mine), CHUNK), threads):
                pass
    best[found < 0] = -1
    return found, best


class Forest:
    """Union-find over 0 to n - 1, many links at a time; the root of a tree is its smallest member."""

    def __init__(self, count: int):
        self._parent = np.arange(count)

    def join(self, ones: np.ndarray, others: np.ndarray) -> None:
        while len(ones):
            ones, others = self._roots(ones), self._roots(others)
            apart = ones != others
            ones, others = ones[apart], others[apart]
            np.minimum.at(self._parent, np.maximum(ones, others), np.minimum(ones, others))

    def labels(self) -> np.ndarray:
        return self._roots(np.arange(len(self._parent)))

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
def _plan(hashes: np.ndarray, partners: float, distance: int) -> tuple[np.ndarray, Fields]:
    """The hashes with their bits dealt to blocks, and the blocks: as many as cost least.

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
            _, sizes_met = np.unique(_move(moved, fields) >> np.uint64(64 - bits), return_counts=True)
            collisions += float((sizes_met * (sizes_met - 1.0)).sum()) / max(1, len(sample)) ** 2 / 3
        cost = len(tables) * (SORT_COST + PAIR_COST * collisions * partners)
        if cost < cheapest:
            cheapest, plan = cost, (dealt, blocks)
    return _move(hashes, plan[0]), plan[1]


def _tables(blocks: int, distance: int) -> list[tuple[int, ...]]:
    return list(combinations(range(blocks), blocks - distance))


def _fields(blocks: Fields, chosen: tuple[int, ...]) -> tuple[list[tuple[int, int]], int]:
    """The chosen blocks, then the others, neighbours as one; and how many bits the chosen ones have."""
    rest = [number for number in range(len(blocks)) if number not in chosen]
    fields: list[tuple[int, int]] = []
    for low, bits in (blocks[number] for number in (*chosen, *rest)):
        if fields and fields[-1][0] == low + bits:
            fields[-1] = (low, fields[-1][1] + bits)
        else:
            fields.append((low, bits))
    return fields, sum(blocks[number][1] for number in chosen)


def _inverse(fields: Fields) -> list[tuple[int, int]]:
    """The fields that move everything back."""
    low, there = 64, []
    for start, bits in fields:
        low -= bits
        there.append((start, low, bits))
    return [(low, bits) for _, low, bits in sorted(there, reverse=True)]


def _move(hashes: np.ndarray, fields: Fields) -> np.ndarray:
    """The hashes with these fields side by side, the first one on top; one dimension."""
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
    """The tables in rounds, and how many neighbours to compare with: what a round links, the next ones spare.

    A glance at some tables comes first: it finds what is dense, before anything is compared with hundreds.
    """
    if tables:
        yield tables[:: -(-len(tables) // GLANCES)], GLANCE
    start, size = 0, ROUND
    while start < len(tables):
        yield tables[start : start + size], WINDOW
        start, size = start + size, 2 * size


def _table(
    values: np.ndarray, labels: np.ndarray, blocks: Fields, distance: int, window: int, chosen: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """Near pairs, as (2, p) places in `values`, of those that agree in the chosen blocks and differ in their label.

    Each one is compared with the `window` next ones alone. Second: how many had more.

    labels: sorted, so that in each bucket, too, equal ones lie side by side and are stepped over.
    """
    fields, bits = _fields(blocks, chosen)
    low = max(1, (len(values) - 1).bit_length())  # a number: the key, and below it the place
    packed = _move(values, fields)
    packed >>= np.uint64(max(64 - bits, low + 1))  # of a long key the top will do
    packed <<= np.uint64(low)
    packed |= np.arange(len(values), dtype=np.uint64)
    packed.sort()
    found, cut, start = [np.empty((2, 0), np.int64)], 0, 0
    while start < len(packed):
        end = min(start + CHUNK, len(packed))
        end += int(np.searchsorted(packed[end:], packed[end - 1] | np.uint64((1 << low) - 1), "right"))  # whole buckets
        keys, place = packed[start:end] >> np.uint64(low), packed[start:end] & np.uint64((1 << low) - 1)
        new = _changes(keys)
        begins, ends = _ends(new | _changes(labels[place])), _ends(new)
        partners = ends - begins
        cut += int((partners > window).sum())
        found.append(place[_near(values[place], begins, np.minimum(partners, window), distance)].astype(np.int64))
        start = end
    return np.concatenate(found, axis=1), cut


def _changes(values: np.ndarray) -> np.ndarray:
    """Behind which of them another value comes, or none."""
    return np.append(values[1:] != values[:-1], True)


def _ends(changes: np.ndarray) -> np.ndarray:
    """For each one where its run ends."""
    ends = np.flatnonzero(changes) + 1
    return np.repeat(ends, np.diff(ends, prepend=0))


def _near(values: np.ndarray, begins: np.ndarray, partners: np.ndarray, distance: int) -> np.ndarray:
    """Near pairs, as (2, p) places, of each value and its `partners`, which lie side by side from its `begins` on."""
    ones = np.flatnonzero(partners)
    begins, partners = begins[ones], partners[ones]
    stops = np.cumsum(partners)
    found, done = [np.empty((2, 0), np.int64)], 0
    while done < len(ones):
        before = stops[done] - partners[done]
        some = slice(done, max(done + 1, int(np.searchsorted(stops, before + PAIRS, "right"))))
        pair_stops = stops[some] - before
        others = np.repeat(begins[some] - pair_stops + partners[some], partners[some])
        others += np.arange(len(others))
        apart = np.repeat(values[ones[some]], partners[some])
        apart ^= values[others]
        near = np.flatnonzero(np.bitwise_count(apart) <= distance)
        if len(near):
            found.append(np.stack([ones[some][np.searchsorted(pair_stops, near, "right")], others[near]]))
        done = some.stop
    return np.concatenate(found, axis=1)


def _nearest(
    hashes: np.ndarray, there: np.ndarray, index: np.ndarray, bits: int, found: np.ndarray, best: np.ndarray
) -> None:
    """Better `found` and `best` of the hashes by those sorted ones `there` that agree in the top bits."""
    limit = np.uint64(1 << (64 - bits))
    place = np.searchsorted(there, hashes & ~(limit - np.uint64(1)))
    at = np.arange(len(hashes))
    while True:
        inside = place < len(there)
        at, place = at[inside], place[inside]
        apart = hashes[at] ^ there[place]
        agree = apart < limit
        at, place, apart = at[agree], place[agree], apart[agree]
        if not len(at):
            return
        away = np.bitwise_count(apart).astype(np.int16)
        better = away < best[at]
        best[at[better]], found[at[better]] = away[better], index[place[better]]
        place = place + 1
