"""Items made ahead by threads: in order, bounded, and ended with those who take them."""

import threading
import time
from collections.abc import Iterator

import pytest

from microdit.pipeline.base.threads import read_ahead, threaded


def counted(count: int, taken: list[int]) -> Iterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


def settled(taken: list[int]) -> int:
    """How many were taken when no more are."""
    before = -1
    while len(taken) != before:
        before = len(taken)
        time.sleep(0.2)
    return before


def test_all_items_come_in_order() -> None:
    assert list(read_ahead(range(100), 7)) == list(range(100))
    assert list(read_ahead([None, 0, None], 1)) == [None, 0, None]
    assert list(read_ahead([], 3)) == []
    assert list(threaded(lambda n: -n, range(100), 4, ahead=1)) == [-n for n in range(100)]


def test_no_more_is_read_ahead_than_asked_for() -> None:
    taken: list[int] = []
    items = read_ahead(counted(100, taken), 5)
    assert taken == []
    assert next(items) == 0
    assert settled(taken) == 6  # the one that was taken, and five
    assert [next(items) for _ in range(4)] == [1, 2, 3, 4]
    assert settled(taken) == 10
    items.close()
    made: list[int] = []
    results = threaded(lambda n: made.append(n) or n, range(100), 3, ahead=8)
    assert next(results) == 0 and settled(made) == 9
    results.close()


def test_an_error_is_raised_in_its_place_and_nothing_goes_on() -> None:
    before = threading.active_count()
    taken: list[int] = []

    def broken() -> Iterator[int]:
        yield from counted(3, taken)
        raise OSError("the disk is gone")

    items = read_ahead(broken(), 10)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert list(items) == []
    endless = read_ahead(iter(int, 1), 4)
    next(endless)
    endless.close()
    assert threading.active_count() == before
