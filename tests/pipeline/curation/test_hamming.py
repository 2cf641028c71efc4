"""Near hashes against brute force, and where they are skewed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.curation import hamming as near
from microdit.pipeline.curation.hamming import MAX_DISTANCE, Forest, groups, nearest

BITS = st.integers(0, 2**64 - 1)
distances = st.integers(0, MAX_DISTANCE)


def flipped(rng: np.random.Generator, hashes: np.ndarray, bits: int) -> np.ndarray:
    """The hashes with exactly so many bits turned."""
    where = rng.permuted(np.tile(np.arange(64, dtype=np.uint64), (len(hashes), 1)), axis=1)[:, :bits]
    return hashes ^ np.bitwise_or.reduce(np.uint64(1) << where, axis=1, initial=np.uint64(0))


def by_brute_force(hashes: np.ndarray, distance: int) -> list[int]:
    """Every pair compared, and the links followed one by one."""
    near_by = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= distance
    labels = [-1] * len(hashes)
    for first in range(len(hashes)):
        waiting = [first] if labels[first] < 0 else []
        while waiting:
            member = waiting.pop()
            if labels[member] < 0:
                labels[member] = first
                waiting.extend(np.flatnonzero(near_by[member]).tolist())
    return labels


@st.composite
def near_sets(draw: st.DrawFn) -> np.ndarray:
    """Hashes of which many are some bits from others, many equal, many with few bits set."""
    some = draw(st.lists(st.one_of(BITS, st.integers(0, 255)), max_size=12))
    made = list(some)
    for _ in range(draw(st.integers(0, 40)) if some else 0):
        value = draw(st.sampled_from(made))
        for bit in draw(st.sets(st.integers(0, 63), max_size=MAX_DISTANCE + 1)):
            value ^= 1 << bit
        made.append(value)
    return np.array(draw(st.permutations(made)), np.uint64)


@given(near_sets(), distances)
@settings(max_examples=60, deadline=None)
def test_groups_are_those_of_brute_force(hashes: np.ndarray, distance: int) -> None:
    found = groups(hashes, distance, threads=1)
    assert found.labels.tolist() == by_brute_force(hashes, distance)
    assert found.cut == 0


@given(near_sets(), near_sets(), distances)
@settings(max_examples=60, deadline=None)
def test_the_nearest_is_that_of_brute_force(hashes: np.ndarray, others: np.ndarray, distance: int) -> None:
    found, best = nearest(hashes, others, distance, threads=1)
    for value, index, away in zip(hashes, found.tolist(), best.tolist(), strict=True):
        apart = np.bitwise_count(others ^ value).tolist()
        if min(apart, default=65) > distance:
            assert (index, away) == (-1, -1)
        else:
            assert away == min(apart) == apart[index]


@pytest.mark.parametrize("distance", [1, 4, 6, 8])
def test_planted_pairs_are_all_found(distance: int) -> None:
    rng = np.random.default_rng(distance)
    some = rng.integers(0, 2**64, 20_000, np.uint64)
    hashes = np.concatenate([some, flipped(rng, some[:1000], distance)])
    labels = groups(hashes, distance).labels
    assert np.array_equal(labels[20_000:], labels[:1000])
    found, best = nearest(flipped(rng, some[:500], distance), some, distance)
    assert np.array_equal(found, np.arange(500)) and set(best.tolist()) == {distance}


def test_large_buckets_are_bounded_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """All within a few bits of one hash: white pages. They become one group, though few pairs are compared."""
    monkeypatch.setattr(near, "WINDOW", 16)
    rng = np.random.default_rng(7)
    white = np.concatenate([flipped(rng, np.zeros(2000, np.uint64), bits) for bits in (2, 3)])
    others = rng.integers(0, 2**64, 4000, np.uint64)
    hashes = np.concatenate([others, white, flipped(rng, others[:500], 6)])
    found = groups(hashes, 6)
    assert found.cut > 0
    assert len(set(found.labels[4000:8000].tolist())) == 1
    assert np.array_equal(found.labels[8000:], found.labels[:500])  # what is not skewed loses nothing


def test_chunks_end_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    some = rng.integers(0, 2**20, 700, np.uint64)
    whole = groups(some, 3).labels
    there = nearest(some, some[::7], 3)[1]
    for size in (4, 64, 699):
        monkeypatch.setattr(near, "CHUNK", size)
        assert np.array_equal(groups(some, 3).labels, whole)
        assert np.array_equal(nearest(some, some[::7], 3)[1], there)
    assert whole.tolist() == by_brute_force(some, 3)


def test_none_and_one() -> None:
    none, one = np.array([], np.uint64), np.array([5], np.uint64)
    for distance in (0, 6):
        assert groups(none, distance).labels.tolist() == []
        assert groups(one, distance).labels.tolist() == [0]
        assert nearest(none, one, distance)[0].tolist() == []
        assert nearest(one, none, distance)[0].tolist() == [-1]
        assert [part.tolist() for part in nearest(one, one, distance)] == [[0], [0]]


def test_what_cannot_be_looked_up() -> None:
    with pytest.raises(ValueError, match="distance 9: expected 0 to 8"):
        groups(np.array([1], np.uint64), 9)
    with pytest.raises(ValueError, match="int64 of shape"):
        groups(np.array([1, 2]), 3)


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
@settings(max_examples=50, deadline=None)
def test_a_forest_links_what_is_linked(links: list[tuple[int, int]]) -> None:
    forest, sets = Forest(30), [{number} for number in range(30)]
    ends = np.array(links, np.int64).reshape(-1, 2).T
    forest.join(ends[0].copy(), ends[1].copy())
    for one, other in links:
        both = sets[one] | sets[other]
        for member in both:
            sets[member] = both
    assert forest.labels().tolist() == [min(group) for group in sets]
