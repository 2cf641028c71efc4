"""Self-termination of worker processes: on a hang, or when their driver is gone."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_timeout = 0.0  # seconds; 0 while nothing is watched
_armed_at = 0.0  # when the timer was last set
_watched = 0  # blocks that are watched now
_timer_lock = threading.Lock()
_parent_watch = threading.Lock()  # held for ever by the one thread that watches the parent


@contextmanager
def watched(timeout: float) -> Iterator[None]:
    """End this process if `alive` is not called for `timeout` seconds while the block runs.

    The traceback of the hang goes to standard error. The timer is C code that does not need the interpreter's lock, so
    it also ends a process that hangs in a decoder. Of several blocks at once the headway of each counts for all.
    """
    global _timeout, _watched
    with _timer_lock:
        _timeout, _watched = timeout, _watched + 1
        _arm(time.monotonic())
    try:
        yield
    finally:
        with _timer_lock:
            _watched -= 1
            if not _watched:
                _timeout = 0.0
                faulthandler.cancel_dump_traceback_later()


def alive() -> None:
    """Report headway, such as a finished sample or received bytes. Cheap, and no effect outside of `watched`."""
    if _timeout and (now := time.monotonic()) - _armed_at > min(1.0, _timeout / 10):
        _arm(now)


def _arm(now: float) -> None:
    """Start the timer again."""
    global _armed_at
    _armed_at = now
    faulthandler.dump_traceback_later(_timeout, exit=True)


def end_with_parent() -> None:
    """Make this process end within a tenth of a second after its parent.

    After a SIGKILL of the driver Ray's workers live on for two seconds. Whatever the driver served (the demo's images)
    is gone by then, and must not be recorded as the images' fault.
    """
    if not _parent_watch.acquire(blocking=False):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
