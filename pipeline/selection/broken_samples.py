"""Samples that turn out broken when they are read."""

import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from obstore.exceptions import BaseError

from microdit.pipeline.base.terminal import printable
from microdit.pipeline.corpus.open_shard import BrokenError
from microdit.pipeline.corpus.quantised import Field
from microdit.pipeline.corpus.shard_cache import ShardCache, ShardId
from microdit.pipeline.selection.sample_index import SampleIndex

WHOLE = -1  # in place of a row


class BrokenSamples:
    """Broken samples by column: (column, source, shard, row or `WHOLE`) -> reason."""

    def __init__(self) -> None:
        self._reasons: dict[tuple[str, str, str, int], str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def why(self, column: str, shard: ShardId, row: int = WHOLE) -> str | None:
        if not self._reasons:
            return None
        return self._reasons.get((column, *shard, WHOLE)) or self._reasons.get((column, *shard, row))

    def add(self, column: str, shard: ShardId, row: int, why: str) -> None:
        """Note something, and print it once."""
        with self._lock:
            if self.why(column, shard, row) is None:
                self._reasons[column, *shard, row] = why
                what = f"column {column}, shard {shard[1]}" + ("" if row == WHOLE else f", row {row}")
                print(printable(f"broken, and replaced: {what}: {why}"), file=sys.stderr, flush=True)

    def listed(self) -> list[list[Any]]:
        """List all for a checkpoint: [column, source, shard, row, why], sorted."""
        with self._lock:
            return sorted([*key, why] for key, why in self._reasons.items())

    def restore(self, listed: Iterable[Iterable[Any]]) -> None:
        """Add what another process, or an earlier run, has found: it stays replaced even if it was mended since."""
        with self._lock:
            for column, source, shard, row, why in listed:
                self._reasons.setdefault((column, source, shard, row), why)

    def count(self, index: SampleIndex, columns: Iterable[str]) -> int:
        """Count the samples of an index that are broken in one of these columns."""
        numbers = {shard: number for number, shard in enumerate(index.shards)}
        wanted, hit = set(columns), np.zeros(len(index), dtype=bool)
        for column, source, shard, row, _ in self.listed():
            number = numbers.get((source, shard))
            if column in wanted and number is not None:
                own = slice(*np.searchsorted(index.shard, [number, number + 1]))
                hit[own] |= True if row == WHOLE else index.row[own] == row
        return int(hit.sum())


class NotingShardCache(ShardCache):
    """A cache of shards that notes in `broken` what cannot be read."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.broken = BrokenSamples()

    def field(self, column: str, shard: ShardId, row: int) -> Field:
        """Read what a row of a column holds.

        Raises:
            BrokenError: it cannot be read.
            RequestError: the storage fails.
        """
        if why := self.broken.why(column, shard, row):
            raise BrokenError(why)
        try:
            return super().field(column, shard, row)
        except BrokenError as error:
            opened = self.request(column, shard).exception() is None
            self.broken.add(column, shard, row if opened else WHOLE, str(error))
            raise

    def note(self, column: str, shard: ShardId, row: int, why: str) -> None:
        """Note a row that can be read but not used, with its key."""
        with suppress(OSError, ValueError, BaseError):  # the sidecar's storage fails: without it, then
            why = f"key {self.corpus.sidecar(self.columns[column][shard])['key'][row]}: {why}"
        self.broken.add(column, shard, row, why)
