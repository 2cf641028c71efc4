"""What the server knows of a corpus: its newest sample table, looked for again while a build writes."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import PROBES
from microdit.pipeline.corpus.presence import is_living
from microdit.pipeline.explore.columns import ShownColumn, shown_columns
from microdit.pipeline.explore.pictures import Members
from microdit.pipeline.explore.pool import Pool
from microdit.pipeline.explore.rows import Place
from microdit.pipeline.selection.view import jobs_of
from microdit.pipeline.tables.sample_table import SampleTable, sample_table

LOOK = 5.0  # seconds between two looks for a living build
PATIENCE = 10  # times as long as reading the table took, until it is read again while a build writes
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
    """A corpus as it is now: its table and columns. `growing`: a build writes it."""

    def __init__(self, corpus: Corpus, pool: Pool):
        self.corpus, self.pool = corpus, pool
        self.members = Members(corpus)
        self.places = Places()
        self.columns: list[ShownColumn] = []
        self.notes: list[str] = []
        """What of the corpus cannot be read, and is left out."""
        self.growing = False
        self.error: str | None = None
        self.changed = asyncio.Event()
        self._table: SampleTable | None = None
        self._seconds = 0.0
        self._answers: OrderedDict[Hashable, asyncio.Future[Any]] = OrderedDict()

    async def refresh(self) -> None:
        """Read the newest table; readers see the one before until it is there.

        Raises:
            RequestError: the corpus has no images.
        """
        began = time.monotonic()
        corpus, table, columns, notes = await asyncio.to_thread(_read, self.corpus.url)
        self._seconds = time.monotonic() - began
        self.notes = notes
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
        last = time.monotonic()
        while True:
            await asyncio.sleep(LOOK)
            was, self.growing = self.growing, await asyncio.to_thread(self.is_growing)
            due = time.monotonic() - last > PATIENCE * self._seconds
            if (self.growing and due) or (was and not self.growing):
                try:
                    await self.refresh()
                    self.error = None
                except (RequestError, OSError, BaseError) as error:
                    self.error = first_line(error)
                last = time.monotonic()

    def is_growing(self) -> bool:
        """Tell whether a build is at work on the corpus."""
        with suppress(OSError, BaseError):
            return any(is_living(self.corpus, probe) for probe in self.corpus.store.list(PROBES))
        return False

    def column(self, name: str) -> ShownColumn:
        """Find a column by name; raises RequestError if there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise RequestError(f"column {name[:80]!r}: there is none; there are {', '.join(c.name for c in self.columns)}")

    async def remembered(self, key: Hashable, answer: Callable[[], Any]) -> Any:
        """Give an answer that was given for this table before, or ask; who asks the same meanwhile waits for it."""
        key = (self.pool.version, key)
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
    table = sample_table(corpus, notes)
    return corpus, table, shown_columns(corpus.columns(), jobs_of(corpus, table)), notes
