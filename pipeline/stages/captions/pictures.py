"""Images on their way to a model that makes words of them: read, decoded and made ready ahead of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from microdit.pipeline.base.threads import read_ahead, threaded
from microdit.pipeline.content.images import decode_within
from microdit.pipeline.corpus.attempt import Attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, read_rows
from microdit.pipeline.stages.rows import fail_image, image_bytes, samples
from microdit.pipeline.stages.stage import Task

T = TypeVar("T")


@dataclass(frozen=True)
class Ready(Generic[T]):
    """A sample whose image is made ready."""

    row: Row
    image: T


@dataclass(frozen=True)
class Loader:
    """How images come: their longest side, the pixels that are decoded at most, and the threads that do it."""

    side: int
    max_pixels: int
    threads: int

    def pictures(
        self,
        stack: ExitStack,
        corpus: Corpus,
        images: Commit,
        task: Task,
        made: Mapping[str, Attempt],
        make: Callable[[np.ndarray], T],
        ahead: int,
    ) -> Iterator[Ready[T]]:
        """Each sample of a shard with `make` of its pixels, (H, W, 3) uint8, in order, while the ones before are used.

        What cannot be decoded is failed in all of `made`. Some `ahead` are ready before they are asked for.
        """

        def prepare(row: Row) -> Ready[T] | None:
            try:
                return Ready(row, make(decode_within(image_bytes(row.members), self.max_pixels, self.side)))
            except Exception as error:  # this sample fails with it, and no other
                fail_image(made.values(), row, error)
                return None

        rows = samples(read_rows(corpus, images), made, task, IMAGES)
        read = stack.enter_context(closing(read_ahead(rows, ahead)))
        prepared = stack.enter_context(closing(threaded(prepare, read, self.threads, ahead + 2 * self.threads)))
        return (ready for ready in prepared if ready is not None)
