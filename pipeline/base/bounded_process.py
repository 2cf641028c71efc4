"""Run a function in a process of its own, within bounds of time and memory."""

import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# -P: a module in the current folder may be somebody else's
START = [
    sys.executable,
    "-P",
    "-c",
    f"import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from {__name__} import serve; serve()",
]


class ProcessDied(RuntimeError):
    """The process of a function ended without a result."""


def run_bounded(function: Callable[..., Any], *arguments: Any, seconds: float | None, memory: int) -> Any:
    """Call a function of a module in a new process, and return its result; the process ends with the call.

    Function, arguments and result are pickled.

    Args:
        seconds: how long it may take, its start included; None for as long as it needs.
        memory: bytes that it may allocate.

    Raises:
        TimeoutError: it took longer.
        MemoryError: it asked for more.
        ProcessDied: the process ended by itself.
        Exception: what the function raised.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    # a session of its own: a signal of the terminal is this process' business
    process = subprocess.Popen(START, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        request = pickle.dumps(sys.path) + pickle.dumps((memory, function, arguments))
        with suppress(BrokenPipeError):  # the exit status says more
            process.stdin.write(request)
            process.stdin.flush()
        answer = _read_all(process.stdout.fileno(), deadline)
        if not answer:
            raise ProcessDied(f"its process ended with status {process.wait()}")
        result, error = pickle.loads(answer)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
    if error is not None:
        raise error
    return result


def _read_all(pipe: int, deadline: float | None) -> bytes:
    """Read a pipe to its end."""
    chunks: list[bytes] = []
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if (left is not None and left <= 0) or not select.select([pipe], [], [], left)[0]:
            raise TimeoutError
        chunk = os.read(pipe, 1 << 20)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def serve() -> None:
    """Answer the one request on standard input: the other end of `run_bounded`."""
    answer_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints
    memory, function, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        answer: tuple[Any, Exception | None] = (function(*arguments), None)
    except Exception as error:
        answer = (None, error)
    pickle.dump(answer, answer_to, protocol=5)
    answer_to.flush()
    os._exit(0)  # threads of a library may be at work


def _end_with_caller() -> None:
    """End this process when the other end of its standard input is closed: the caller was killed."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
