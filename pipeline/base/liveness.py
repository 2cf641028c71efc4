"""How a worker's process comes to an end before its time: because it hangs, its driver is gone, or a test wants it."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_timeout = 0.0
_wound = 0.0
_watched = 0
_watch = threading.Lock()
_orphan_watch = threading.Lock()


@contextmanager
def watched(timeout: float) -> Iterator[None]:
    """While the block runs, the process ends itself when `alive` is not called for `timeout` seconds.

    It writes to standard error where it hung. The watch is C code without the interpreter's lock, so that it also ends
    a process that hangs in a decoder. Of several blocks at once each one's headway counts for all.
    """
    global _timeout, _watched
    with _watch:
        _timeout, _watched = timeout, _watched + 1
        _wind(time.monotonic())
    try:
        yield
    finally:
        with _watch:
            _watched -= 1
            if not _watched:
                _timeout = 0.0
                faulthandler.cancel_dump_traceback_later()


def alive() -> None:
    """Headway was made: a sample is done, bytes have come. Cheap, and nothing outside of `watched`."""
    if _timeout and (now := time.monotonic()) - _wound > min(1.0, _timeout / 10):
        _wind(now)


def _wind(now: float) -> None:
    global _wound
    _wound = now
    faulthandler.dump_traceback_later(_timeout, exit=True)


def end_with_parent() -> None:
    """Make this process end within a tenth of a second when the one that started it is gone.

    After a SIGKILL of the driver Ray's workers live on for two seconds. What was served by the driver (the demo's
    images) is gone by then, and nobody should record that as the images' fault.
    """
    if not _orphan_watch.acquire(blocking=False):
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
