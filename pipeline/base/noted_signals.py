"""Note SIGINT and SIGTERM for work that asks now and then whether it shall end."""

import math
import signal
import time
from types import FrameType
from typing import Any

PATIENCE = 5.0  # seconds after a signal in which another one is taken for the same wish


class NotedSignals:
    """Note the first SIGTERM or SIGINT inside the block in `received`; one that comes much later acts as usual.

    (After ctrl-C the terminal and torchrun both send one.)
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = math.inf
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "NotedSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > PATIENCE:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
