"""Keep a device busy with batches: read ahead, prepare in threads, encode, write in a thread; all of it in order.

committed tar --a thread--> rows --threads--> prepared --the caller's thread, on the device--> encoded --a thread--> tar
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from microdit.pipeline.base.threads import read_ahead, threaded
from microdit.pipeline.corpus.rows import Row
from microdit.pipeline.stages.rows import RowFailure, image_failure

WRITING = 2  # batches that wait for the device, or to be written
GPU_THREADS = 8  # that decode beside a GPU at least: those that it does not need sleep

T = TypeVar("T")
R = TypeVar("R")


def decode_threads(asked: int, device: Any) -> int:
    """Return how many threads prepare samples for a device: as asked for, beside a GPU at least `GPU_THREADS`."""
    return max(asked, GPU_THREADS) if device.type == "cuda" else asked


class BatchLine:
    """The threads around a device for one shard. To be used as a context; leaving it ends them.

    Each step is bounded, so that a fast one waits for a slow one instead of filling the memory. An error in any step is
    raised in the caller's thread.

    Args:
        threads: that prepare.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self._stack = ExitStack()
        self._writer = ThreadPoolExecutor(1)
        self._writing: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._writer)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def read(self, items: Iterable[T], ahead: int) -> Generator[T]:
        """Yield the items, read by a thread of its own, at most `ahead` of them before they are asked for."""
        return self._stack.enter_context(closing(read_ahead(items, ahead)))

    def prepare(self, items: Iterable[T], function: Callable[[T], R], ahead: int) -> Generator[R]:
        """Apply `function` to every item in order, on the threads, at most `ahead` items before they are asked for."""
        return self._stack.enter_context(closing(threaded(function, items, self.threads, ahead)))

    def encode(self, batches: Iterable[T], encode: Callable[[T], R], write: Callable[[T, R], None]) -> None:
        """Encode each batch in this thread, and call `write(batch, encoded)` in the writer's.

        At most `WRITING` batches wait to be written when this returns; `finish` waits for them.
        """
        for batch in batches:
            self._writing.append(self._writer.submit(write, batch, encode(batch)))
            if len(self._writing) > WRITING:
                self._writing.popleft().result()

    def finish(self) -> None:
        """Wait until everything that is encoded is written."""
        while self._writing:
            self._writing.popleft().result()

    def run(self, batches: Iterable[T], encode: Callable[[T], R], write: Callable[[T, R], None]) -> None:
        """Run `encode`, then `finish`."""
        self.encode(batches, encode, write)
        self.finish()


@dataclass(frozen=True)
class PreparedImage(Generic[T]):
    """A sample whose image is ready for a model."""

    row: Row
    image: T


def prepared_images(
    line: BatchLine,
    rows: Iterable[Row],
    prepare: Callable[[Row], T],
    fail: Callable[[Row, RowFailure], None],
    ahead: int,
) -> Iterator[PreparedImage[T]]:
    """Prepare the image of each row, in order, `ahead` of their use; `fail` those whose image cannot be used."""

    def prepared(row: Row) -> PreparedImage[T] | None:
        try:
            return PreparedImage(row, prepare(row))
        except Exception as error:  # this sample fails with it, and no other
            fail(row, image_failure(error))
            return None

    images = line.prepare(line.read(rows, ahead), prepared, ahead + 2 * line.threads)
    return (image for image in images if image is not None)
