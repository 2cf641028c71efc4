"""Fetch many URLs at once, bounded in time, size, number and memory; results come in the order of the requests."""

import asyncio
import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from microdit.pipeline.base.retry import Backoff, retry_after
from microdit.pipeline.config.sources import FetchOptions

WINDOW = 2048  # requests that may be running or completed ahead of the one that is waited for
MAX_HELD = 256 << 20  # bytes of completed requests that may wait for their turn; running ones may add to them
TRIES = 2
PAUSE, JITTER = 0.4, (0.5, 1.5)  # seconds before the retry, and the range of their random factor
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
CHUNK = 64 << 10
T = TypeVar("T")


@dataclass(frozen=True)
class Fetched:
    """The bytes of a URL, or the reason (a short code) and one line of detail why there are none."""

    data: bytes | None
    reason: str | None = None
    detail: str = ""


class _Failed(Exception):
    """One try that failed. `transient`: another one may succeed, after `asked` seconds if the server says so."""

    def __init__(self, reason: str, detail: str, transient: bool = False, asked: float = 0.0):
        super().__init__(detail)
        self.reason, self.detail, self.transient, self.asked = reason, detail, transient, asked


def fetch_all(requests: Iterable[tuple[T, str | None]], options: FetchOptions) -> Iterator[tuple[T, Fetched | None]]:
    """Fetch the URLs of (anything, URL) pairs; yield (anything, result) in the same order.

    Where the URL is None nothing is fetched and the result is None. Fetching goes on in a thread while the caller works
    on a result. A URL costs at most `options.timeout` seconds and holds up only those that wait for their turn behind
    it: meanwhile up to 2,048 others are fetched, or 256 MiB of them.
    """
    fetcher = _Fetcher(iter(requests), options)
    fetcher.thread.start()
    try:
        while (item := fetcher.started.get()) is not None:
            what, future = item
            fetched = None if future is None else future.result()
            fetcher.make_room(fetched)
            yield what, fetched
        if fetcher.error is not None:
            raise fetcher.error
    finally:
        fetcher.stop()


class _Fetcher:
    """An event loop in a thread, with `options.concurrency` workers that take one request after the other."""

    def __init__(self, requests: Iterator[tuple[Any, str | None]], options: FetchOptions):
        self._requests, self._options = requests, options
        self.started: queue.SimpleQueue[tuple[Any, Future[Fetched] | None] | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self._ahead = self._held = 0  # requests started and not handed over, and the bytes that came for them
        self._loop = asyncio.new_event_loop()
        # names are looked up in these; one dead name server must not hold up the look-ups at the others
        self._loop.set_default_executor(ThreadPoolExecutor(options.concurrency, "lookup"))
        self.thread = threading.Thread(target=self._run, name="fetch", daemon=True)

    def _run(self) -> None:
        self._main = self._loop.create_task(self._work())
        try:
            self._loop.run_until_complete(self._main)
        except BaseException as error:
            self.error = error
        finally:
            self.started.put(None)
            self._loop.close()

    def make_room(self, fetched: Fetched | None) -> None:
        """Make room for another request: the next result was handed over."""

        def update() -> None:
            self._ahead -= 1
            self._held -= len(fetched.data or b"") if fetched is not None else 0
            self._room.set()

        self._call(update)

    def stop(self) -> None:
        self._call(lambda: self._main.cancel())
        self.thread.join()

    def _call(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: all is fetched
            self._loop.call_soon_threadsafe(function)

    async def _work(self) -> None:
        options = self._options
        self._room, self._taking = asyncio.Event(), asyncio.Lock()
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=options.concurrency, ttl_dns_cache=300),
            timeout=aiohttp.ClientTimeout(connect=options.idle_timeout, sock_read=options.idle_timeout),
            headers={"User-Agent": options.user_agent, "Accept": "image/*,*/*;q=0.5"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        async with session, asyncio.TaskGroup() as workers:
            for _ in range(options.concurrency):
                workers.create_task(self._worker(session))

    async def _worker(self, session: aiohttp.ClientSession) -> None:
        while (request := await self._next()) is not None:
            url, future = request
            try:
                fetched = await self._fetch(session, url)
                self._held += len(fetched.data or b"")
                future.set_result(fetched)
            finally:
                future.cancel()  # no effect on one that has its result

    async def _next(self) -> tuple[str, Future[Fetched]] | None:
        """Take the next request with a URL, once there is room for one; None if there are no more."""
        async with self._taking:
            while True:
                while self._ahead >= WINDOW or self._held >= MAX_HELD:
                    self._room.clear()
                    await self._room.wait()
                try:
                    request = next(self._requests, None)
                except Exception as error:  # raised in the caller, behind the results of the requests before it
                    self.error, request = error, None
                    self._requests = iter(())
                if request is None:
                    return None
                what, url = request
                self._ahead += 1
                if url is not None:
                    future: Future[Fetched] = Future()
                    self.started.put((what, future))
                    return url, future
                self.started.put((what, None))

    async def _fetch(self, session: aiohttp.ClientSession, url: str) -> Fetched:
        """Fetch a URL in at most `TRIES` tries within its time; aiohttp itself resends where a connection breaks."""
        end = time.monotonic() + self._options.timeout
        backoff = Backoff(PAUSE, jitter=JITTER, tries=TRIES)
        while True:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    return Fetched(await self._get(session, url))
            except TimeoutError:
                failed = _Failed("timeout", f"no complete answer within {self._options.timeout:g} seconds")
            except _Failed as error:
                failed = error
            except Exception as error:  # whatever a server can provoke must fail its own image only
                failed = _Failed("connection", f"{type(error).__name__}: {error}")
            pause = backoff.next_pause() if failed.transient else None
            if pause is None or time.monotonic() + max(failed.asked, pause) >= end:
                return Fetched(None, failed.reason, failed.detail)
            await asyncio.sleep(max(failed.asked, pause))

    async def _get(self, session: aiohttp.ClientSession, url: str) -> bytes:
        """Make one request.

        Raises:
            _Failed: there is no complete answer of status 200 within the limits.
        """
        options = self._options
        try:
            # aiohttp gives up at this number, not after it, and takes 0 for no bound
            async with session.get(url, max_redirects=options.max_redirects + 1) as response:
                if response.status != 200:
                    asked = retry_after(response.headers.get("Retry-After")) or 0.0
                    transient = response.status in TRANSIENT and asked <= options.retry_after
                    detail = f"{response.status} {response.reason or ''}"
                    raise _Failed(f"http_{response.status}", detail, transient, asked)
                if (response.content_length or 0) > options.max_bytes:
                    raise _Failed("too_large", f"{response.content_length} bytes, at most {options.max_bytes} are read")
                data = bytearray()
                async for chunk in response.content.iter_chunked(CHUNK):
                    data += chunk
                    if len(data) > options.max_bytes:
                        raise _Failed("too_large", f"more than {options.max_bytes} bytes")
                return bytes(data)
        except aiohttp.ServerTimeoutError as error:
            detail = str(error) or f"silent for {options.idle_timeout:g} seconds"
            raise _Failed("timeout", detail, transient=True) from None
        except aiohttp.TooManyRedirects:
            raise _Failed("redirects", f"more than {options.max_redirects} redirects") from None
        except aiohttp.ClientConnectorDNSError as error:
            transient = getattr(error.os_error, "errno", None) == socket.EAI_AGAIN
            raise _Failed("dns", str(error), transient) from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise _Failed("bad_url", f"{type(error).__name__}: {error}") from None
        except aiohttp.ClientPayloadError as error:
            raise _Failed("truncated", f"the transfer broke off: {error}", transient=True) from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise _Failed("connection", f"{type(error).__name__}: {error}", transient=True) from None
        except aiohttp.ClientError as error:
            raise _Failed("connection", f"{type(error).__name__}: {error}") from None
