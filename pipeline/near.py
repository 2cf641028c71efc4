"""Near 64-bit hashes among millions: multi-index look-up by Hamming distance, in numpy and bounded memory.

The 64 bits are cut into m blocks. Two hashes at most d bits apart agree wholly in at least m - d blocks (pigeonhole),
so for each choice of m - d blocks the hashes are sorted with those bits in front, and only neighbours that agree in
them are compared. Moving bits changes no distance: what is sorted are the hashes themselves, with no number beside
them.

Real hashes are skewed: drawings on white, flat colours. Equal hashes are one. Bits that are nearly always the same are
dealt to all blocks evenly, m is chosen by how often the hashes at hand collide, and within what still agrees a hash is
compared with the next `WINDOW` ones alone; how often that cut something off is told.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipeline.parallel import threaded

MAX_DISTANCE = 8
WINDOW = 512  # neighbours, of those that agree in the chosen blocks, that a hash is compared with
CHUNK = 1 << 18  # hashes at a time: a few megabytes
SAMPLE = 1 << 18  # hashes that the number of blocks is chosen by
MORE_BLOCKS = 5  # at most so many blocks agree
SORT_COST, PAIR_COST = 80.0, 5.0  # nanoseconds, about: to move and sort a hash, to compare two

Fields = Sequence[tuple[int, int]]  # of a hash, from its top: (lowest bit, bits)


@dataclass(frozen=True)
class Groups:
    """`labels`, (n,) int64: the smallest index that a hash is linked to. `cut`: how many hashes had more neighbours
    that agree in some choice of blocks than were compared, summed over the `tables` (the choices)."""

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
    forest, lock = Forest(len(values)), threading.Lock()

    def look(chosen: tuple[int, ...]) -> int:
        fields, bits = _fields(blocks, chosen)
        moved = _move(values, fields)
        moved.sort()
        back, cut = _inverse(fields), 0
        for start in range(0, len(moved), CHUNK):
            pairs, more = _neighbours(moved[start : start + CHUNK + WINDOW + 1], bits, distance)
            cut += more
            if len(pairs):
                ends = np.searchsorted(values, _move(pairs, back).reshape(pairs.shape))
                with lock:
                    forest.join(*ends)
        return cut

    tables = _tables(len(blocks), distance) if distance and len(values) > 1 else []
    cut = sum(threaded(look, tables, threads, ahead=threads))
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


def _neighbours(part: np.ndarray, bits: int, distance: int) -> tuple[np.ndarray, int]:
    """Near pairs (2, p) of the first `CHUNK` of sorted hashes and those behind them that agree in the top bits.

    What is linked through neighbours that follow each other is left out, which keeps the pairs few where all is alike.
    Second: how many hashes had more partners than `WINDOW`.
    """
    limit = np.uint64(1 << (64 - bits))
    run = np.zeros(len(part), np.int32)
    np.cumsum(np.bitwise_count(part[1:] ^ part[:-1]) > distance, out=run[1:])
    at = np.arange(min(CHUNK, len(part)))
    found: list[np.ndarray] = []
    for step in range(1, WINDOW + 2):
        if at[-1] + step >= len(part):
            at = at[: np.searchsorted(at, len(part) - step)]
        ones, others = part[at], part[at + step]
        apart = ones ^ others
        agree = apart < limit
        if step > WINDOW:
            return _joined(found), int(agree.sum())
        near = np.bitwise_count(apart) <= distance
        if step > 1:
            near &= run[at] != run[at + step]
        if near.any():
            found.append(np.stack([ones[near], others[near]]))
        at = at[agree]
        if not len(at):
            break
    return _joined(found), 0


def _joined(found: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(found, axis=1) if found else np.empty((0, 2), np.uint64)


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
