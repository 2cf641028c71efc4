"""What is dropped is near what is kept, whatever the hashes are."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.curation.greedy import nearest_kept
from microdit.pipeline.curation.hamming import groups
from microdit.pipeline.curation.hashes import FLAT_BITS, Hashed, near


def hashed(hashes: list[int], areas: list[int], colours: list[tuple[int, int, int]], pixels: list[int]) -> Hashed:
    count = len(hashes)
    whole = np.stack([np.array(pixels, np.uint64), np.zeros(count, np.uint64)], 1)
    colour = np.array(colours, np.float32).reshape(count, 3)
    return Hashed(np.arange(count), np.array(hashes, np.uint64), whole, np.array(areas), colour, 0)


@st.composite
def chains(draw: st.DrawFn) -> Hashed:
    """Hashes of which each is some bits from the one before it, of several sizes."""
    value, made = draw(st.integers(0, 2**64 - 1)), []
    for flips in draw(st.lists(st.sets(st.integers(0, 63), max_size=5), max_size=40)):
        for bit in flips:
            value ^= 1 << bit
        made.append(value)
    made = draw(st.permutations(made))
    areas = [draw(st.integers(1, 3)) for _ in made]
    return hashed(made, areas, [(0, 0, 0)] * len(made), list(range(len(made))))


@given(chains(), st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_what_is_dropped_is_within_the_distance_of_what_is_kept(found: Hashed, distance: int) -> None:
    labels = groups(found.phash, distance, 1).labels
    chosen = nearest_kept(labels, found.area, lambda a, b: near(found, distance, a, b))
    keeper = chosen.keeper
    away = np.bitwise_count(found.phash ^ found.phash[keeper])
    assert (away <= distance).all()
    assert (keeper[keeper] == keeper).all()
    assert (found.area[keeper] >= found.area).all()
    kept = np.flatnonzero(keeper == np.arange(len(keeper)))
    between = np.bitwise_count(found.phash[kept, None] ^ found.phash[None, kept])
    assert (between[~np.eye(len(kept), dtype=bool)] > distance).all()
    assert chosen.sizes.tolist() == [int((keeper == each).sum()) for each in keeper]


def test_flat_pictures_are_told_apart_by_their_colour() -> None:
    flat = 1 << 63
    assert (flat & ((1 << 63) - 1)).bit_count() <= FLAT_BITS
    colours = [(255, 0, 0), (254, 1, 0), (0, 0, 255), (0, 90, 0), (0, 90, 1)]
    found = hashed([flat, flat, flat, flat, flat | 1], [1] * 5, colours, list(range(5)))
    keeper = nearest_kept(np.zeros(5, np.int64), found.area, lambda a, b: near(found, 6, a, b)).keeper
    assert keeper.tolist() == [0, 0, 2, 3, 3]


def test_flat_pictures_without_colours_are_compared_by_their_pixels() -> None:
    flat, unknown = 1 << 63, (np.nan,) * 3
    found = hashed([flat] * 4, [1] * 4, [unknown] * 4, [1, 2, 1, 3])  # type: ignore[list-item]
    keeper = nearest_kept(np.zeros(4, np.int64), found.area, lambda a, b: near(found, 6, a, b)).keeper
    assert keeper.tolist() == [0, 1, 0, 3]
