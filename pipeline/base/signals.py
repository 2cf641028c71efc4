"""Turn SIGINT and SIGTERM into a clean stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microdit.pipeline.engine.driver import Driver


class Stopped(KeyboardInterrupt):
    """A signal ended the build: what was committed stays, the same command goes on."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again and it goes on")
        self.signum = signum


class StopSignals:
    """What SIGINT and SIGTERM do: ask the driver to stop; before it runs, or the second time, end at once."""

    def __init__(self) -> None:
        self.driver: Driver | None = None

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.driver is None or self.driver.stop is not None:
            raise Stopped(signum)
        self.driver.stop = signum


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signals = StopSignals()
    signals.install()
    try:
        yield signals
    finally:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in before.items():
                signal.signal(signum, handler)
