"""Many small reads at once, with bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def threaded(function: Callable[[T], R], items: Iterable[T], threads: int = 16) -> Iterator[R]:
    """`function` of every item, in order, on some threads; at most two results for each thread wait to be taken."""
    pool = ThreadPoolExecutor(threads)
    try:
        rest = iter(items)
        waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(rest, 2 * threads))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield done
    finally:
        pool.shutdown(cancel_futures=True)
