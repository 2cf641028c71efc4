"""Turn SIGINT and SIGTERM into a clean stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal ended the build: commits stay, and the same command goes on."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again and it goes on")
        self.signum = signum


class StopSignals:
    """Handle SIGINT and SIGTERM: the first one calls `stop`; one before `stop` is set, and the second, end at once.

    Attributes:
        stop: called with the first signal's number; None as long as there is nothing to end cleanly.
        received: the number of the signal that `stop` was called with, None before it.
        last: the number of the last signal that came.
    """

    def __init__(self) -> None:
        self.stop: Callable[[int], None] | None = None
        self.received: int | None = None
        self.last: int | None = None

    def install(self) -> None:
        """Set the handlers, if this is the main thread: no other one can."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        self.last = signum
        if self.stop is None or self.received is not None:
            raise Stopped(signum)
        self.received = signum
        self.stop(signum)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle signals in the block, and restore the handlers from before at its end.

    Raises:
        Stopped: a signal ended the block, in whatever way a library passed it on.
    """
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signals = StopSignals()
    signals.install()
    try:
        yield signals
    except Stopped:
        raise
    except KeyboardInterrupt:  # Ray's C++ raises its own in place of ours
        raise Stopped(signal.SIGINT if signals.last is None else signals.last) from None
    except SystemExit as error:  # Ray's handler, from the moment that Ray sets it until `install` sets ours again
        if error.code != signal.SIGTERM:
            raise
        raise Stopped(signal.SIGTERM) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in before.items():
                signal.signal(signum, handler)
