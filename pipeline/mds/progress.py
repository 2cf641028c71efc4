"""Progress of a conversion, shard by shard, as a build reports its own."""

import time

from microdit.pipeline.base.progress import Line, Progress, Snapshot, Tally


class ConversionProgress:
    """Counts the shards of one conversion and reports after each.

    Args:
        report: receives the snapshots; None for none.
        began: `time.monotonic()` when the conversion began.
        total: all shards.
        done: those that earlier runs converted.
    """

    def __init__(self, report: Progress | None, began: float, total: int, done: int, threads: int):
        self._report, self._began, self._total, self._done, self._threads = report, began, total, done, threads
        self._tally, self._aside = Tally(), 0

    @property
    def samples(self) -> int:
        """Samples that this run wrote."""
        return self._tally.samples

    def begin(self) -> None:
        """Report the state before the first shard."""
        self._tally.begin()
        self._snapshot()

    def add(self, samples: int, failed: int, size: int, aside: bool = False) -> None:
        """Count a shard, with the bytes that were written for it, and report."""
        self._tally.add(1, samples, failed, size)
        self._aside += aside
        self._snapshot()

    def _snapshot(self) -> None:
        if self._report is None:
            return
        rates, done = self._tally.rates(), self._done + self._tally.jobs
        left = self._total - done
        line = Line(
            "convert",
            "shards",
            done,
            self._total,
            aside=self._aside,
            running=min(self._threads, left),
            workers=self._threads,
            samples=self._tally.samples,
            failed=self._tally.failed,
            rate=rates.samples,
            bytes_rate=rates.bytes,
            left=left / rates.jobs if rates.jobs else None,
        )
        self._report(Snapshot(time.monotonic() - self._began, [line]))
