import os
import signal
import time

import pytest

from microdit.pipeline.base.bounded_process import ProcessDied, run_bounded
from microdit.pipeline.base.errors import RequestError

MEMORY = 1 << 30


def test_result_and_error_come_back() -> None:
    assert run_bounded(os.path.join, "a", "b", seconds=60, memory=MEMORY) == "a/b"
    with pytest.raises(ValueError, match="invalid literal"):
        run_bounded(int, "x", seconds=None, memory=MEMORY)


def test_bounds() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        run_bounded(time.sleep, 60, seconds=0.5, memory=MEMORY)
    assert time.monotonic() - began < 10
    with pytest.raises(MemoryError):
        run_bounded(bytes, 2 * MEMORY, seconds=60, memory=MEMORY)
    with pytest.raises(ProcessDied, match=f"status {-signal.SIGKILL}"):
        run_bounded(_kill, seconds=60, memory=MEMORY)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_of_ours_stays_what_it_is() -> None:
    with pytest.raises(RequestError, match=r"^no$"):
        run_bounded(_refuse, seconds=60, memory=MEMORY)


def _refuse() -> None:
    raise RequestError("no")
