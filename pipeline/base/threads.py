"""Run many small calls at once in threads, with bounded memory."""

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
    """Yield `function` of every item in order, computed by several threads.

    At most `ahead` results, by default two for each thread, are computed before they are asked for. The caller's thread
    takes the items. An error is raised at its item's position, and ends the generator.
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
    """Yield the items; a thread takes up to `most` of them before they are asked for."""
    rest = iter(items)
    for item in threaded(lambda _: next(rest, END), repeat(None), threads=1, ahead=most):
        if item is END:
            return
        yield item  # type: ignore[misc]


@cache
def side_by_side() -> ThreadPoolExecutor:
    """Return this process's pool of threads for a few concurrent writes to a disk or a bucket."""
    return ThreadPoolExecutor(4, thread_name_prefix="publish")
