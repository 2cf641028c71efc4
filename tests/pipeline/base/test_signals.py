"""A signal ends a build with its own exit status, in whatever way a library passes it on."""

import os
import signal
import sys

import pytest

from microdit.pipeline.base.signals import Stopped, stop_signals


def test_a_second_signal_that_ray_turns_into_an_interrupt_keeps_its_number() -> None:
    noted: list[int] = []
    with pytest.raises(Stopped, match="SIGTERM") as stopped, stop_signals() as signals:
        signals.stop = noted.append
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)
        except Stopped:
            raise KeyboardInterrupt from None  # as Ray's C++ does
    assert (stopped.value.signum, noted) == (signal.SIGTERM, [signal.SIGTERM])


def test_a_signal_while_ray_starts_is_no_plain_exit() -> None:
    """Ray sets a handler of its own that exits with 15."""
    with pytest.raises(Stopped, match="SIGTERM"), stop_signals():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 1)
    with pytest.raises(SystemExit), stop_signals():
        sys.exit(2)
