"""Call a function for many items on the Ray cluster that RAY_ADDRESS names."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from microdit.pipeline.base.threads import chunks, threaded
from microdit.pipeline.engine.cluster import all_cpus, joined

T = TypeVar("T")
R = TypeVar("R")
CHUNK = 8  # items of a task: it takes seconds
AHEAD = 2  # tasks for each CPU that are begun before a result is taken


def spread(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `function` of every item, in the order in which the cluster is ready with them.

    Raises:
        RequestError: nothing answers at RAY_ADDRESS.
        ray.exceptions.RayError: a task failed, or its nodes died again and again.
    """
    with joined():
        task: Any = ray.remote(_call)
        function_ref = ray.put(function)
        waiting: list[Any] = []
        for chunk in chunks(items, CHUNK):
            waiting.append(task.remote(function_ref, chunk))
            if len(waiting) >= AHEAD * all_cpus(None):
                done, waiting = ray.wait(waiting)
                yield from ray.get(done[0])
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done[0])


def _call(function: Callable[[T], R], items: list[T]) -> list[R]:
    return list(threaded(function, items, threads=2))
