"""A few worker processes for many readers: questions in turn, bounded in time, stopped when their reader leaves."""

import asyncio
import os
import pickle
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.marks import MARKS
from microdit.pipeline.explore.worker import INTERRUPT, LENGTH, START, WorkerView
from microdit.pipeline.selection.running import TOO_LONG, LimitError
from microdit.pipeline.tables.database import SqlLimits
from microdit.pipeline.tables.sample_table import SampleTable

END = 1.0  # seconds that a query may take to end after it was interrupted
HEAVY = 5.0  # seconds after which a question gives way to all others on this machine
WAY = 15  # of niceness
LATER = 1.0  # seconds between the first worker's start and that of the others
MOST_WAITING = 64  # questions of one reader that may wait
PIPE = 1 << 20
Question = Callable[..., Any]
"""A function of a module whose first argument is the worker's `WorkerView`."""


class BusyError(RuntimeError):
    """A reader has asked more than may wait."""


@dataclass(eq=False)
class _Asked:
    """A question that waits or is being answered."""

    reader: str
    function: Question
    arguments: tuple[Any, ...]
    answer: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class _Worker:
    """A worker process, as its server sees it."""

    def __init__(self, process: asyncio.subprocess.Process):
        self.process = process
        self.version = -1
        """Of the sample table that it has open."""
        self.marks = -1
        """Number of marks it shows."""
        self.heavy = False

    @classmethod
    async def start(cls, corpus: Corpus, limits: SqlLimits, threads: int) -> "_Worker":
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*START, stdin=pipe, stdout=pipe, limit=PIPE)
        worker = cls(process)
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(sys.path))
        worker.send(pickle.dumps((corpus, limits, threads)))
        return worker

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(LENGTH.pack(len(data)) + data)

    async def call(self, function: Question, *arguments: Any) -> Any:
        """Ask, and wait for the answer.

        Raises:
            EOFError: the process has died.
            Exception: what the function raised.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.send(pickle.dumps((function, arguments)))
        try:
            await self.process.stdin.drain()
            (size,) = LENGTH.unpack(await self.process.stdout.readexactly(LENGTH.size))
            data = await self.process.stdout.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EOFError from None
        result, error = pickle.loads(data)
        if error is not None:
            raise error
        return result

    def give_way(self) -> None:
        """Let all others on this machine go first; without the rights of root that is for ever."""
        self.heavy = True
        tasks = Path(f"/proc/{self.process.pid}/task")
        with suppress(OSError):
            for thread in [int(one.name) for one in tasks.iterdir()] if tasks.is_dir() else [self.process.pid]:
                with suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread, WAY)

    async def end(self) -> None:
        """Kill the process, and close its pipes."""
        assert self.process.stdin is not None
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.stdin.close()
        with suppress(ConnectionError):
            await self.process.stdin.wait_closed()
        await self.process.wait()


class Pool:
    """Workers that share the questions of all readers: each reader in turn, one reader never on all workers.

    A question that its caller gives up is interrupted; whose process heeds no interrupt loses it.
    """

    def __init__(self, corpus: Corpus, limits: SqlLimits, size: int, threads: int):
        self.corpus, self.limits, self.size, self.threads = corpus, limits, size, threads
        self.most = max(1, size - 1)
        """Workers that one reader may hold."""
        self.table: SampleTable | None = None
        self.version = -1
        self.marks: tuple[pa.Table, int] = (MARKS.empty_table(), 0)
        """The marks that count, and how many there are with those that do not."""
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._waiting: OrderedDict[str, deque[_Asked]] = OrderedDict()
        self._running: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the first worker; the others follow a little later, so that a page opens sooner."""
        await self._add()
        self._keep(asyncio.create_task(self._add_others()))

    async def _add_others(self) -> None:
        await asyncio.sleep(LATER)
        for _ in range(self.size - 1):
            await self._add()

    def _keep(self, task: asyncio.Task[None]) -> None:
        """Keep a task until it has ended, or the pool is closed."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _add(self) -> None:
        worker = await _Worker.start(self.corpus, self.limits, self.threads)
        self._workers.add(worker)
        self._idle.append(worker)
        self._hand_out()

    def show(self, table: SampleTable) -> None:
        """Let all further questions see this table."""
        self.table, self.version = table, self.version + 1
        self._hand_out()

    async def ask(self, reader: str, function: Question, *arguments: Any) -> Any:
        """Call a function in a worker, as soon as it is this reader's turn.

        Raises:
            LimitError: it took more than the limits allow.
            BusyError: too many questions of this reader wait.
            Exception: what the function raised.
        """
        asked = _Asked(reader, function, arguments)
        waiting = self._waiting.setdefault(reader, deque())
        if len(waiting) >= MOST_WAITING:
            raise BusyError(f"{len(waiting)} questions of yours wait already; let the page ask fewer at a time")
        waiting.append(asked)
        self._hand_out()
        try:
            return await asked.answer
        finally:
            asked.answer.cancel()

    def _hand_out(self) -> None:
        """Give questions to idle workers, the readers in turn."""
        if self.table is None:
            return
        for reader in list(self._waiting):
            waiting = self._waiting[reader]
            while waiting and waiting[0].answer.done():
                waiting.popleft()
            if not waiting:
                del self._waiting[reader]
                continue
            if not self._idle:
                return
            if self._running.get(reader, 0) >= self.most:
                continue
            self._waiting.move_to_end(reader)
            self._running[reader] = self._running.get(reader, 0) + 1
            self._keep(asyncio.create_task(self._answer(self._take(), waiting.popleft())))

    def _take(self) -> _Worker:
        """Take an idle worker, one that has the table open if there is any."""
        ready = next((worker for worker in self._idle if worker.version == self.version), self._idle[0])
        self._idle.remove(ready)
        return ready

    async def _answer(self, worker: _Worker, asked: _Asked) -> None:
        """Have a worker answer, and put it back; or another one in its place."""
        call = asyncio.create_task(self._called(worker, asked))
        call.add_done_callback(lambda done: done.cancelled() or done.exception())  # the asker may have left
        try:
            alive = await self._watched(worker, call, asked)
        except asyncio.CancelledError:
            call.cancel()
            raise
        finally:
            self._running[asked.reader] -= 1
            if not self._running[asked.reader]:
                del self._running[asked.reader]
        if alive and not worker.heavy:
            self._idle.append(worker)
            self._hand_out()
        else:
            self._workers.discard(worker)
            await worker.end()
            await self._add()

    async def _called(self, worker: _Worker, asked: _Asked) -> Any:
        if worker.version != self.version:
            version, table = self.version, self.table
            await worker.call(WorkerView.open, table)
            worker.version = version
        if worker.marks != self.marks[1]:
            marks = self.marks
            await worker.call(WorkerView.mark, *marks)
            worker.marks = marks[1]
        return await worker.call(asked.function, *asked.arguments)

    async def _watched(self, worker: _Worker, call: asyncio.Task[Any], asked: _Asked) -> bool:
        """Wait for an answer as long as it may take and somebody wants it; returns whether the worker is alive."""
        seconds = self.limits.seconds or 60.0
        for wait in (HEAVY, max(seconds - HEAVY, 0.0)):
            await asyncio.wait({call, asked.answer}, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            if call.done() or asked.answer.done():
                break
            worker.give_way()
        if not call.done():
            worker.send(INTERRUPT)
            await asyncio.wait({call}, timeout=END)
            if not asked.answer.done():
                asked.answer.set_exception(LimitError(TOO_LONG.format(seconds=seconds)))
        if not call.done():
            call.cancel()
            return False
        error = call.exception()
        if not asked.answer.done():
            if isinstance(error, EOFError):
                asked.answer.set_exception(LimitError("SQL: its process died, perhaps for want of memory; read less"))
            elif error is not None:
                asked.answer.set_exception(error)
            else:
                asked.answer.set_result(call.result())
        return not isinstance(error, EOFError)

    async def close(self) -> None:
        """End all workers."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers:
            await worker.end()
