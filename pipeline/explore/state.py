"""Hold the newest sample table of a corpus for the server, and refresh it while a build writes."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.marks import Mark, Marks, marks_table
from microdit.pipeline.corpus.names import PROBES
from microdit.pipeline.corpus.presence import is_living
from microdit.pipeline.explore.columns import ShownColumn, shown_columns
from microdit.pipeline.explore.histograms import quantiles
from microdit.pipeline.explore.last_table import keep_table, last_table
from microdit.pipeline.explore.pictures import Members
from microdit.pipeline.explore.pool import Pool
from microdit.pipeline.explore.progress import progress
from microdit.pipeline.explore.rows import Place
from microdit.pipeline.explore.rows import last as last_rows
from microdit.pipeline.selection.view import jobs_of
from microdit.pipeline.tables.sample_table import SampleTable, sample_table

LOOK = 5.0  # seconds between two looks for a living build
SELDOM = 60.0  # seconds after which the table is read again where none is known to write
PATIENCE = 10  # times as long as reading the table took, until it is read again while a build writes
NEWEST = 12  # rows that events show
KEPT_ANSWERS = 2048
KEPT_PLACES = 100_000


class Places:
    """Where samples that were shown lie, by source and key: their pictures and details are asked for by these."""

    def __init__(self) -> None:
        self._places: OrderedDict[tuple[str, str], Place] = OrderedDict()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            if row.get("status", "ok") == "ok":  # a failed row may have the key of a good one
                self._places[row["source"], row["key"]] = (row["source"], row["shard"], row["row"])
                self._places.move_to_end((row["source"], row["key"]))
        while len(self._places) > KEPT_PLACES:
            self._places.popitem(last=False)

    def get(self, key: tuple[str, str]) -> Place | None:
        return self._places.get(key)


class CorpusState:
    """A corpus as it is now: its table and columns. `growing`: a build writes it.

    folder: where the table is noted for the next time.
    """

    def __init__(self, corpus: Corpus, pool: Pool, folder: Path):
        self.corpus, self.pool = corpus, pool
        self.members = Members(corpus)
        self.places = Places()
        self.columns: list[ShownColumn] = []
        self.notes: list[str] = []
        """Objects of the corpus that cannot be read, and are left out."""
        self.growing = False
        self.error: str | None = None
        """Why the newest table cannot be read, while an older one is shown."""
        self.live: dict[str, Any] = {}
        """Progress of the build: rows, failures and rate of the images, and done of total of each column."""
        self.look = LOOK
        self.folder = folder
        self._stale = False
        self.changed = asyncio.Event()
        self.marks = Marks(corpus)
        self.newest_marks: dict[Place, Mark] = {}
        self._table: SampleTable | None = None
        self._seconds = 0.0
        self._answers: OrderedDict[Hashable, asyncio.Future[Any]] = OrderedDict()

    async def begin(self) -> None:
        """Show the table that this machine saw last, or read the newest.

        Raises:
            RequestError: the corpus has no images.
        """
        await asyncio.to_thread(self.marks.read)
        self.show_marks()
        table = await asyncio.to_thread(last_table, self.corpus, self.folder)
        if table is None:
            await self.refresh()
        else:
            self._show(self.corpus, table, await asyncio.to_thread(_columns, self.corpus, table))
            self._stale = True

    async def refresh(self) -> None:
        """Read the newest table; readers see the one before until it is there.

        Raises:
            RequestError: the corpus has no images.
        """
        began = time.monotonic()
        corpus, table, columns, self.notes = await asyncio.to_thread(_read, self.corpus.url)
        await asyncio.to_thread(self.marks.read)
        self.show_marks()
        self._seconds = time.monotonic() - began
        self._show(corpus, table, columns)
        await asyncio.to_thread(keep_table, corpus, table, self.folder)

    def _show(self, corpus: Corpus, table: SampleTable, columns: list[ShownColumn]) -> None:
        """Let all further questions see a table, if it is another one."""
        if self._table is not None and (table.parts, columns) == (self._table.parts, self.columns):
            return
        self.corpus, self._table, self.columns = corpus, table, columns
        self.members.corpus, self.members.names = corpus, table.names
        self._answers.clear()
        self.pool.corpus = corpus
        self.pool.show(table)
        self.changed.set()
        self.changed = asyncio.Event()

    async def follow(self) -> None:
        """Look for living builds for ever; while there is one, and once when it has ended, read the table again."""
        last = -math.inf if self._stale else time.monotonic()
        while True:
            await asyncio.sleep(0 if last == -math.inf else self.look)
            was, self.growing = self.growing, await asyncio.to_thread(self.is_growing)
            due = time.monotonic() - last > PATIENCE * self._seconds
            if (due and (self.growing or time.monotonic() - last > SELDOM)) or (was and not self.growing):
                try:
                    await self.refresh()
                    self.error = None
                    self.live = await asyncio.to_thread(progress, self.corpus, self.live)
                    newest = await self.pool.ask("events", last_rows, NEWEST)
                    self.places.add(newest)
                    self.live["newest"] = newest
                except (RequestError, OSError, BaseError) as error:
                    self.error = first_line(error)
                last = time.monotonic()

    def show_marks(self) -> None:
        """Let all further questions see the marks that were read."""
        self.newest_marks = self.marks.newest()
        if self.pool.marks[1] != self.marks.next:
            self.pool.marks = marks_table(self.newest_marks.values()), self.marks.next

    def is_growing(self) -> bool:
        """Tell whether a build is at work on the corpus."""
        with suppress(OSError, BaseError):
            return any(is_living(self.corpus, probe) for probe in self.corpus.store.list(PROBES))
        return False

    async def quantiles(self, reader: str, columns: Sequence[str]) -> dict[str, list[float]]:
        """Estimate how the numbers of columns are spread, once for each table."""
        answer = await self.remembered(("quantiles", tuple(columns)), lambda: self.pool.ask(reader, quantiles, columns))
        return dict(answer)

    def column(self, name: str) -> ShownColumn:
        """Find a column by name; raises RequestError if there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise RequestError(f"column {name[:80]!r}: there is none; there are {', '.join(c.name for c in self.columns)}")

    async def remembered(self, key: Hashable, answer: Callable[[], Any]) -> Any:
        """Give an answer that was given for this table before, or ask; who asks the same meanwhile waits for it."""
        key = (self.pool.version, self.pool.marks[1] if "mark" in repr(key) else 0, key)
        if (known := self._answers.get(key)) is not None and not known.cancelled():
            with suppress(asyncio.CancelledError):  # of who asked first, unless it is our own
                return await asyncio.shield(known)
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[key] = future
        while len(self._answers) > KEPT_ANSWERS:
            self._answers.popitem(last=False)
        try:
            result = await answer()
        except BaseException as error:
            self._answers.pop(key, None)
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # nobody else may wait for it
            else:
                future.cancel()
            raise
        future.set_result(result)
        return result


def _read(url: str) -> tuple[Corpus, SampleTable, list[ShownColumn], list[str]]:
    corpus = Corpus.open(url)
    notes: list[str] = []
    table = sample_table(corpus, notes, reads=None)
    return corpus, table, _columns(corpus, table), notes


def _columns(corpus: Corpus, table: SampleTable) -> list[ShownColumn]:
    return shown_columns(corpus.columns(), jobs_of(corpus, table))
