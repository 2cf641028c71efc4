"""State shared by the handlers of one server."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import web

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.explore.chosen import SelectedRows
from microdit.pipeline.explore.guard import Guard
from microdit.pipeline.explore.pictures import PictureReader
from microdit.pipeline.explore.pool import Pool
from microdit.pipeline.explore.similar import VectorIndex
from microdit.pipeline.explore.state import CorpusState
from microdit.pipeline.explore.thumbnails import ThumbnailFolder, cache_folder
from microdit.pipeline.tables.database import GIB, SqlLimits

WORKERS = 3
QUERY_SECONDS = 60.0
QUERY_MEMORY = GIB // 2
QUERY_DISK = 8 * GIB
MOST_THREADS = 4  # of a query


class Explorer:
    """State shared by the handlers of one server."""

    def __init__(self, corpus: Corpus, guard: Guard, read_only: bool, runs: Path | None):
        self.guard, self.read_only, self.runs = guard, read_only, runs
        disk = min(QUERY_DISK, SqlLimits().disk)
        limits = SqlLimits(memory=min(QUERY_MEMORY, SqlLimits().memory), disk=disk, seconds=QUERY_SECONDS)
        self.pool = Pool(corpus, limits, WORKERS, min(os.cpu_count() or 1, MOST_THREADS))
        self.state = CorpusState(corpus, self.pool, cache_folder() / "tables")
        self.pictures = PictureReader(self.state.members, ThumbnailFolder(cache_folder() / "thumbnails"))
        self.selected = SelectedRows(corpus)
        self.decoding, self.saving, self.marking = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self.indexing = asyncio.Lock()
        self.index: tuple[list[str], VectorIndex] | None = None
        """Of the embeddings that were asked last, with the names of their commits."""
        self.listeners = 0
        """Pages that wait for events."""
        self.readers = ThreadPoolExecutor(32 if corpus.store.root is None else 4, thread_name_prefix="pictures")

    @property
    def corpus(self) -> Corpus:
        return self.state.corpus

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that reads objects."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, function, *arguments)


EXPLORER = web.AppKey("explorer", Explorer)
