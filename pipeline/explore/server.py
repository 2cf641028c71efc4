"""The server of `microdit explore`: one process, which asks worker processes for all SQL."""

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import web

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.explore.guard import Guard
from microdit.pipeline.explore.pictures import Pictures
from microdit.pipeline.explore.pool import Pool
from microdit.pipeline.explore.state import CorpusState
from microdit.pipeline.explore.thumbnails import ThumbnailFolder, thumbnail_folder
from microdit.pipeline.tables.database import GIB, SqlLimits

WORKERS = 3
QUERY_SECONDS = 60.0
QUERY_MEMORY = GIB // 2
QUERY_DISK = 8 * GIB
MOST_THREADS = 4  # of a query
LARGEST_REQUEST = 256 << 10  # bytes


class Explorer:
    """What the handlers of one server share."""

    def __init__(self, corpus: Corpus, guard: Guard, read_only: bool, runs: Path | None):
        self.guard, self.read_only, self.runs = guard, read_only, runs
        disk = min(QUERY_DISK, SqlLimits().disk)
        limits = SqlLimits(memory=min(QUERY_MEMORY, SqlLimits().memory), disk=disk, seconds=QUERY_SECONDS)
        self.pool = Pool(corpus, limits, WORKERS, min(os.cpu_count() or 1, MOST_THREADS))
        self.state = CorpusState(corpus, self.pool)
        self.pictures = Pictures(self.state.members, ThumbnailFolder(thumbnail_folder()))
        self.readers = ThreadPoolExecutor(32 if corpus.store.root is None else 4, thread_name_prefix="pictures")

    @property
    def corpus(self) -> Corpus:
        return self.state.corpus

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that reads objects."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, function, *arguments)


EXPLORER = web.AppKey("explorer", Explorer)


def make_app(explorer: Explorer) -> web.Application:
    """Build the application around an explorer; it starts the workers and reads the table when it starts."""
    from microdit.pipeline.explore.handlers import ROUTES, errors

    app = web.Application(middlewares=[explorer.guard.middleware, errors], client_max_size=LARGEST_REQUEST)
    app[EXPLORER] = explorer
    app.add_routes(ROUTES)
    app.cleanup_ctx.append(_running)
    return app


async def _running(app: web.Application) -> AsyncIterator[None]:
    explorer = app[EXPLORER]
    starting = asyncio.create_task(explorer.pool.start())
    try:
        await explorer.state.refresh()
        await starting
        following = asyncio.create_task(explorer.state.follow())
        try:
            yield
        finally:
            following.cancel()
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await explorer.pool.close()
        explorer.readers.shutdown(wait=False, cancel_futures=True)


def bind(host: str, port: int) -> socket.socket:
    """Take a port; 0 takes any that is free.

    Raises:
        RequestError: it is taken, or this machine has no such address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RequestError(f"--port {port}: another program has it; give another one, or 0 for any") from None
        raise RequestError(
            f"--host {host} --port {port}: it cannot be served there: {error.strerror or error}"
        ) from None


async def serve(
    corpus: Corpus,
    address: socket.socket,
    token: str | None,
    read_only: bool,
    runs: Path | None,
    ready: Callable[[str], object],
) -> None:
    """Serve until the task is cancelled.

    Args:
        address: as `bind` gives it.
        ready: called with the address of the page when it can be opened.

    Raises:
        RequestError: the corpus has no images.
    """
    host, port = address.getsockname()[:2]
    app = make_app(Explorer(corpus, Guard(host, port, token), read_only, runs))
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=2.0)
    try:
        await runner.setup()
        await web.SockSite(runner, address).start()
        named = f"[{host}]" if ":" in host else host
        ready(f"http://{named}:{port}/" + (f"?token={token}" if token else ""))
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
