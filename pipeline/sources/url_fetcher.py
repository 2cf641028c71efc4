"""Fetch many URLs at once, bounded in time, size, number and memory; results come in the order of the requests."""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.retry import Backoff
from microdit.pipeline.base.secrets import without_secrets
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.host_pace import HostPace
from microdit.pipeline.sources.slots import Slots
from microdit.pipeline.sources.spool import Spool
from microdit.pipeline.sources.url_request import Received, RequestFailed, request, seconds
from microdit.pipeline.sources.web_client import Client

WINDOW = 16384  # requests that may be running or completed ahead of the one that is waited for
MAX_HELD = 256 << 20  # bytes of completed requests that may wait in memory; running ones may add to them
MAX_SPOOLED = 4 << 30  # and of those that may wait on disk
LATE_AFTER = 0.5  # seconds without an answer after which a request lets another one begin beside it
MAX_LATE = 1024
TRIES = 2
REFUSALS = 10  # further tries of a URL whose host refuses it and allows others
SECOND_WAIT = 1.0  # seconds for an answer of a host that was silent before, in this unit or an earlier one
PAUSE, JITTER = 0.4, (0.5, 1.5)  # seconds before the retry, and the range of their random factor
TICK = 0.1
TURN = 0.02  # seconds for which requests are begun before those that run have their turn
STUCK = 5.0  # seconds without a tick after which the thread hangs
T = TypeVar("T")


@dataclass(frozen=True)
class Fetched:
    """The bytes of a URL, or the reason (a short code) and one line of detail why there are none."""

    data: bytes | None
    reason: str | None = None
    detail: str = ""
    url: str = ""
    """Where the bytes came from, after redirects."""
    unverified: str = ""
    """Fault of the certificate of a host that was asked all the same."""
    spooled: tuple[int, int] | None = None


def fetch_all(requests: Iterable[tuple[T, str | None]], options: FetchOptions) -> Generator[tuple[T, Fetched | None]]:
    """Fetch the URLs of (anything, URL) pairs; yield (anything, result) in the same order.

    Where the URL is None nothing is fetched and the result is None. Fetching goes on in a thread while the caller works
    on a result. A URL costs at most `options.timeout` seconds, waiting for its host's pace apart, and holds up only
    those that wait for their turn behind it: meanwhile up to 16,384 others are fetched, 256 MiB of them into memory and
    4 GiB onto disk. A host that was silent is tried again, shortly, when nothing else is left to begin; the next units
    of this process know which hosts were silent.
    """
    fetcher = _Fetcher(iter(requests), options)
    fetcher.thread.start()
    try:
        while (item := fetcher.wait(fetcher.started.get)) is not None:
            what, future = item
            fetched = None if future is None else fetcher.wait(future.result)
            yield what, fetcher.hand_over(fetched)
        if fetcher.error is not None:
            raise fetcher.error
    finally:
        fetcher.stop()


class _Fetcher:
    """An event loop in a thread, with a task for each request ahead, of which `options.concurrency` are active."""

    def __init__(self, requests: Iterator[tuple[Any, str | None]], options: FetchOptions):
        self._requests, self._options = requests, options
        self.started: queue.SimpleQueue[tuple[Any, Future[Fetched] | None] | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self._ahead = self._held = 0  # requests started and not handed over, and the bytes in memory for them
        self._handed = 0  # requests handed over
        self._running = self._late = 0
        self._exhausted = False
        self._hosts: dict[str, HostPace] = {}
        self._spool, self._lock = Spool(), threading.Lock()
        self._ticked = time.monotonic()
        self._room, self._at_end = asyncio.Event(), False
        self._loop = asyncio.new_event_loop()
        # names are looked up in these; one dead name server must not hold up the look-ups at the others
        self._loop.set_default_executor(ThreadPoolExecutor(options.concurrency, "lookup"))
        self.thread = threading.Thread(target=self._run, name="fetch", daemon=True)

    # -- in the caller's thread --------------------------------------------------------------------------------------
    def wait(self, get: Callable[..., Any]) -> Any:
        """Wait for a result; the process is alive for as long as the loop turns."""
        while True:
            try:
                return get(timeout=0.2)
            except (queue.Empty, TimeoutError):
                if time.monotonic() - self._ticked < STUCK:
                    alive()

    def hand_over(self, fetched: Fetched | None) -> Fetched | None:
        """Return a result with its bytes, and make room for another request."""
        held = len(fetched.data or b"") if fetched is not None else 0
        if fetched is not None and fetched.spooled is not None:
            with self._lock:
                fetched = replace(fetched, data=self._spool.take(fetched.spooled), spooled=None)

        def update() -> None:
            self._ahead -= 1
            self._handed += 1
            self._held -= held
            self._room.set()
            self._room = asyncio.Event()

        self._call(update)
        return fetched

    def stop(self) -> None:
        self._call(lambda: self._main.cancel())
        self.thread.join()
        self._spool.close()

    def _call(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: all is fetched
            self._loop.call_soon_threadsafe(function)

    # -- in the loop's -----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        self._main = self._loop.create_task(self._work())
        try:
            self._loop.run_until_complete(self._main)
        except BaseException as error:
            self.error = error
        finally:
            self.started.put(None)
            self._loop.close()

    async def _work(self) -> None:
        self._slots = Slots(self._options.concurrency)
        ticks = asyncio.create_task(self._tick())
        try:
            async with Client(self._options) as client, asyncio.TaskGroup() as tasks:
                number, turned = 0, time.monotonic()
                while (started := await self._next()) is not None:
                    url, future = started
                    if future is not None:
                        self._running += 1
                        tasks.create_task(self._answer(client, number, url, future))
                    number += 1
                    # a unit's URLs are all known early, so that the wait for silent hosts ends with the others
                    if time.monotonic() - turned > TURN:
                        await asyncio.sleep(0)
                        turned = time.monotonic()
                self._exhausted = True
        finally:
            ticks.cancel()

    async def _tick(self) -> None:
        """Find out when nothing is left to begin but the URLs of silent hosts."""
        while True:
            await asyncio.sleep(TICK)
            self._ticked = time.monotonic()
            waiting = [host for host in self._hosts.values() if host.waiting]
            idle = self._running <= self._late + sum(host.waiting for host in waiting)
            self._at_end = idle and (self._exhausted or self._ahead >= WINDOW)
            for host in waiting if self._at_end else ():
                host.proceed()

    async def _next(self) -> tuple[str, Future[Fetched] | None] | None:
        """Take the next request, once there is room for one; None if there are no more."""
        while self._ahead >= WINDOW:
            await self._room.wait()
        try:
            what, url = next(self._requests)
        except StopIteration:
            return None
        except Exception as error:  # raised in the caller, behind the results of the requests before it
            self.error = error
            return None
        self._ahead += 1
        future: Future[Fetched] | None = Future() if url is not None else None
        self.started.put((what, future))
        return url or "", future

    async def _answer(self, client: Client, number: int, url: str, future: Future[Fetched]) -> None:
        try:
            fetched = await self._fetch(client, number, url)
            if fetched.data is not None and self._held + len(fetched.data) > MAX_HELD and MAX_SPOOLED:
                with self._lock:
                    fetched = replace(fetched, data=None, spooled=self._spool.put(fetched.data))
            if fetched.detail:
                fetched = replace(fetched, detail=without_secrets(fetched.detail))
            self._held += len(fetched.data or b"")
            future.set_result(fetched)
        finally:
            self._running -= 1
            future.cancel()  # no effect on one that has its result

    def _host(self, url: str) -> HostPace:
        try:
            name = urlsplit(url).netloc.rpartition("@")[2].lower()
        except ValueError:
            name = ""
        if name not in self._hosts:
            self._hosts[name] = HostPace(name, lambda: self._at_end)
        return self._hosts[name]

    async def _fetch(self, client: Client, number: int, url: str) -> Fetched:
        """Fetch a URL in several tries within its time; aiohttp itself resends where a connection breaks."""
        host = self._host(url)
        left, wait, lenient = self._options.timeout, self._options.idle_timeout, False
        backoff, refusals = Backoff(PAUSE, jitter=JITTER, tries=TRIES), REFUSALS
        failed: RequestFailed | None = None
        while True:
            if not await host.begin():
                detail = "its host answers no requests" if host.dead else "its host allows too few requests"
                failed = failed or RequestFailed("timeout" if host.dead else "http_429", detail)
                return Fetched(None, failed.reason, failed.detail)
            began, allowed, last = time.monotonic(), host.allowed, self._at_end
            try:
                if host.put_off or host.suspect:
                    wait = min(wait, SECOND_WAIT)
                received = await self._try(client, number, url, min(left, wait), left, lenient, host)
                host.allow()
                return Fetched(received.data, url=received.url, unverified=received.unverified)
            except RequestFailed as error:
                longer = failed if failed is not None and failed.silent and error.silent else None
                failed = longer or error
            except Exception as error:  # whatever a server can provoke must fail its own image only
                failed = RequestFailed("connection", f"{type(error).__name__}: {error}")
            finally:
                host.end()
            left -= time.monotonic() - began
            if failed.silent:
                host.silent(last)
                wait = min(wait, SECOND_WAIT)
            lenient = lenient or failed.unreadable
            if _refused(failed):
                if failed.transient:
                    host.refuse(PAUSE if failed.asked is None else failed.asked)
                    refusals -= 1
                    if refusals and host.allowed > allowed:
                        continue
            elif not failed.silent:
                host.allow()
            pause = backoff.next_pause() if failed.transient else None
            pause = max(pause, failed.asked or 0.0) if pause is not None else None
            if pause is None or pause >= left:
                return Fetched(None, failed.reason, failed.detail)
            if not failed.unreadable and not failed.silent:
                await asyncio.sleep(pause)
                left -= pause

    async def _take_slot(self, number: int, host: HostPace) -> None:
        """Take a slot once there is room for an answer, which may have been filled while the slot was waited for.

        The first requests to each host go first, so that a silent one is waited for while others are fetched.
        """
        while True:
            await self._slots.acquire((not host.new, number))
            if self._held + self._spool.size < MAX_HELD + MAX_SPOOLED or number <= self._handed:
                return
            self._slots.release()
            await self._room.wait()

    async def _try(
        self,
        client: Client,
        number: int,
        url: str,
        wait: float,
        left: float,
        lenient: bool,
        host: HostPace,
    ) -> Received:
        """Make one try once there is room for its answer, and a slot, which it gives back early if it is late."""
        late = host.suspect and self._late < MAX_LATE  # such ones need no slot, so that they are known early
        owned = not late
        self._late += late
        if owned:
            await self._take_slot(number, host)

        def give_back() -> None:
            nonlocal owned, late
            host.late()
            if owned and self._late < MAX_LATE:
                self._late += 1
                owned, late = False, True
                self._slots.release()

        timer = self._loop.call_later(LATE_AFTER, give_back)

        def heard() -> None:
            timer.cancel()
            host.heard()

        try:
            async with asyncio.timeout(left):
                return await request(client, url, wait, lenient, heard)
        except TimeoutError:
            raise RequestFailed("timeout", f"no complete answer within {seconds(self._options.timeout)}") from None
        finally:
            timer.cancel()
            self._late -= late
            if owned:
                self._slots.release()


def _refused(failed: RequestFailed) -> bool:
    """Tell whether the host wants fewer requests."""
    return failed.reason == "http_429" or (failed.reason == "http_503" and failed.asked is not None)
