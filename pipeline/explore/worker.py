"""A process that answers questions about the sample table, one after the other, and can be interrupted."""

import os
import pickle
import queue
import resource
import signal
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO

import pyarrow as pa

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.view import BESIDE, OpenView, connected, run
from microdit.pipeline.tables.database import SqlLimits
from microdit.pipeline.tables.sample_table import SampleTable

START = [
    sys.executable,
    "-P",
    "-c",
    f"import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from {__name__} import serve; serve()",
]
INTERRUPT = b"interrupt"
LENGTH = struct.Struct("<Q")


class WorkerView:
    """The view `samples` that a worker has open, for the functions that a server asks it to call."""

    def __init__(self, corpus: Corpus, limits: SqlLimits, threads: int):
        self.corpus, self.limits, self.threads = corpus, limits, threads
        self._stack = ExitStack()
        self._view: OpenView | None = None
        self._marks: tuple[pa.Table, int] | None = None

    def open(self, table: SampleTable) -> None:
        """Open the view over a sample table in place of the one before."""
        self._stack.close()
        self.corpus = Corpus.open(self.corpus.url)
        self._view = self._stack.enter_context(connected(self.corpus, table, self.limits, threads=self.threads))
        if self._marks is not None:
            self.view.show_marks(*self._marks)

    @property
    def view(self) -> OpenView:
        assert self._view is not None
        return self._view

    def rows(self, sql: str, runs: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Run a SELECT over all samples, or those of some parts of the table, and give its rows."""
        rows: list[dict[str, Any]] = self.table(sql, runs).to_pylist()
        return rows

    def table(self, sql: str, runs: Sequence[int] | None = None) -> pa.Table:
        """Run a SELECT as `rows` does, and give an Arrow table."""
        self.view.runs = runs
        return run(self.view, sql, self.limits)

    def mark(self, table: pa.Table, count: int) -> None:
        """Show these marks, which are the first `count` of the corpus, in further queries."""
        self._marks = table, count
        self.view.show_marks(table, count)

    def interrupt(self) -> None:
        """Stop the query that runs, from another thread."""
        if self._view is not None:
            self._view.interrupt()


def write_frame(file: BinaryIO, data: bytes) -> None:
    """Write bytes with their length before them."""
    file.write(LENGTH.pack(len(data)) + data)
    file.flush()


def read_frame(file: BinaryIO) -> bytes:
    """Read what `write_frame` wrote; raises EOFError at the end of the file."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    data = file.read(LENGTH.unpack(head)[0])
    return data


def serve() -> None:
    """Answer requests on standard input until it ends: the other end of `microdit.pipeline.explore.pool`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the server ends, and then this process
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints
    requests = sys.stdin.buffer
    corpus, limits, threads = pickle.loads(read_frame(requests))
    memory = 2 * limits.memory + BESIDE
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    view = WorkerView(corpus, limits, threads)
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_answer, args=(view, waiting, answers), daemon=True).start()
    while True:
        try:
            data = read_frame(requests)
        except EOFError:  # the server has ended
            os._exit(0)
        if data == INTERRUPT:
            view.interrupt()
        else:
            waiting.put(data)


def _answer(view: WorkerView, waiting: "queue.SimpleQueue[bytes]", answers: BinaryIO) -> None:
    """Call what is asked for, one after the other, and write results or errors."""
    while True:
        function, arguments = pickle.loads(waiting.get())
        try:
            answer: tuple[Any, Exception | None] = (_called(function, view, arguments), None)
        except Exception as error:
            answer = (None, error)
        try:
            data = pickle.dumps(answer, protocol=5)
        except Exception as error:
            data = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
        write_frame(answers, data)


def _called(function: Callable[..., Any], view: WorkerView, arguments: Sequence[Any]) -> Any:
    try:
        return function(view, *arguments)
    except MemoryError:
        raise RequestError("SQL: it needs more memory than a page may take; let it read less") from None
