"""The server of `microdit explore`: one process, which asks worker processes for all SQL."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import web

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.explore import change_handlers, detail_handlers, handlers, run_handlers
from microdit.pipeline.explore.explorer import EXPLORER, Explorer
from microdit.pipeline.explore.guard import Guard

LARGEST_REQUEST = 256 << 10  # bytes
LONGEST_LINE = 64 << 10  # of an address, which has a whole condition in it


def make_app(explorer: Explorer) -> web.Application:
    """Build the application around an explorer; it starts the workers and reads the table when it starts."""
    app = web.Application(middlewares=[explorer.guard.middleware, handlers.errors], client_max_size=LARGEST_REQUEST)
    app[EXPLORER] = explorer
    for routes in (handlers.ROUTES, detail_handlers.ROUTES, change_handlers.ROUTES, run_handlers.ROUTES):
        app.add_routes(routes)
    app.cleanup_ctx.append(_running)
    return app


async def _running(app: web.Application) -> AsyncIterator[None]:
    explorer = app[EXPLORER]
    starting = asyncio.create_task(explorer.pool.start())
    try:
        await explorer.state.begin()
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
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=2.0, max_line_size=LONGEST_LINE
    )
    try:
        await runner.setup()
        await web.SockSite(runner, address).start()
        named = f"[{host}]" if ":" in host else host
        ready(f"http://{named}:{port}/" + (f"?token={token}" if token else ""))
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
