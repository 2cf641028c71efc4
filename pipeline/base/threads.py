"""Many small things at once, with bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import islice, repeat
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

END: object = object()


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut the items into lists of `size`; the last one may be shorter."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def threaded(
    function: Callable[[T], R], items: Iterable[T], threads: int = 16, ahead: int | None = None
) -> Generator[R]:
    """`function` of every item, in order, on some threads.

    At most `ahead` results, by default two for each thread, are made before they are asked for. The items are taken by
    the caller's thread.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        rest = iter(items)
        first = islice(rest, 2 * threads if ahead is None else ahead)
        waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in first)
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield done
    finally:
        pool.shutdown(cancel_futures=True)


def read_ahead(items: Iterable[T], most: int) -> Generator[T]:
    """The items, taken by a thread of its own, at most `most` of them before they are asked for."""
    rest = iter(items)
    for item in threaded(lambda _: next(rest, END), repeat(None), threads=1, ahead=most):
        if item is END:
            return
        yield item  # type: ignore[misc]


@cache
def side_by_side() -> ThreadPoolExecutor:
    """Return this process's threads for a few writes that wait for a disk or a bucket at once."""
    return ThreadPoolExecutor(4, thread_name_prefix="publish")
