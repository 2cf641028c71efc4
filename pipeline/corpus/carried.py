"""Carry the rows of a shard over into its next generation, of which only some failed rows are made again."""

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, ObjectRef
from microdit.pipeline.corpus.rows import Row, read_rows
from microdit.pipeline.corpus.shard_files import SIDECAR
from microdit.pipeline.storage.store import Store

BLOCK = 1 << 20


def has_hash(store: Store, ref: ObjectRef) -> bool:
    """Read an object whole; return True if it is there, and has the bytes that its commit says."""
    digest = hashlib.sha256()
    try:
        with store.open(ref.name) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == ref.sha256


class CarriedRows:
    """The rows of a committed shard, but for those that failed for some reasons.

    Args:
        again: True for the reasons of rows that are made again.

    Raises:
        ValueError: the shard is damaged.
    """

    def __init__(self, corpus: Corpus, commit: Commit, again: Callable[[str], bool]):
        for ref in {commit.object.name: commit.object, commit.sidecar.name: commit.sidecar}.values():
            if not has_hash(corpus.store, ref):
                raise ValueError(
                    f"{ref.name} is damaged, and its rows cannot be carried over: "
                    "`microdit build --repair` makes the shard again"
                )
        self._corpus, self.commit = corpus, commit
        self._again = {
            line["row"]
            for line in corpus.sidecar(commit).select(["row", "reason"]).to_pylist()
            if line["reason"] is not None and again(line["reason"])
        }

    def __contains__(self, row: int) -> bool:
        return row not in self._again

    def before(self, row: int | None = None) -> Iterator[Row]:
        """Take the rows that come before this one, or all that are left, in order; each comes once."""
        while self._next is not None and (row is None or self._next.row < row):
            if self._next.row in self:
                yield self._next
            self._next = next(self._rows, None)

    @cached_property
    def _rows(self) -> Iterator[Row]:
        return read_rows(self._corpus, self.commit)

    @cached_property
    def _next(self) -> Row | None:
        return next(self._rows, None)


def scalars_of(row: Row) -> dict[str, Any]:
    """Return a row's own scalars, without what every sidecar has."""
    return {name: value for name, value in row.scalars.items() if name not in SIDECAR.names}
