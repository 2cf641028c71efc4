"""Learn how often a host may be asked, and whether it answers at all."""

import asyncio
import math
import random
import time

UNPROVEN = 16  # requests at once to a host that has not answered yet, or is tried again
SILENT = 3  # requests in a row without any answer after which a host is put off
JITTER = (1.0, 1.25)
FIRST_INTERVAL = 0.1  # seconds between the requests to a host that refused its first ones
FASTER = 0.99  # the factor of the interval with each answer: a host that refused once may allow more later
PATIENCE = 300.0  # seconds that a request waits for its host's pace
POLL = 0.5


class HostPace:
    """The requests to one host: how many are open, when the next may begin, how many found it silent."""

    def __init__(self) -> None:
        self.dead = False
        """It was silent when it was tried again: its other URLs fail at once."""
        self.waiting = 0
        """Requests that wait for their turn."""
        self.allowed = 0
        """Requests that it did not refuse."""
        self._silent = self._silent_at_end = self._open = 0
        self._proven = False
        self._began = time.monotonic()
        self._interval, self._next = 0.0, 0.0
        self._turn, self._changed = asyncio.Lock(), asyncio.Event()

    @property
    def put_off(self) -> bool:
        return self._silent >= SILENT

    async def begin(self, at_end: asyncio.Event) -> bool:
        """Wait for the turn of a request: for the host's pace, or at a silent host for the end of the unit.

        Returns:
            False if the host is dead, or allows so few requests that the turn does not come.
        """
        if self._proven and not self._interval and not self.put_off:
            self._open += 1
            return True
        since = time.monotonic()
        self.waiting += 1
        try:
            async with self._turn:
                while not self.dead:
                    pause = self._next - time.monotonic()
                    if self._interval and time.monotonic() + max(pause, 0.0) > since + PATIENCE:
                        return False
                    if self.put_off and not at_end.is_set():
                        await _wait(at_end, POLL)
                    elif self._open >= (math.inf if self._proven and not self.put_off else UNPROVEN):
                        await _wait(self._changed)
                        self._changed.clear()
                    elif pause > 0:
                        await asyncio.sleep(min(pause, POLL))
                    else:
                        self._open += 1
                        self._next = max(self._next, time.monotonic()) + self._interval
                        return True
                return False
        finally:
            self.waiting -= 1

    def end(self) -> None:
        """Take note that a request is over."""
        self._open -= 1
        self._changed.set()

    def heard(self) -> None:
        """Take note that an answer begins."""
        self._silent = self._silent_at_end = 0
        self._proven, self.dead = True, False
        self._changed.set()

    def allow(self) -> None:
        """Take note that a request was not refused."""
        self.allowed += 1
        self._interval *= FASTER

    def silent(self, last: bool) -> None:
        """Take note that no answer came; `last`: at the end of the unit, where a host that stays silent is given up."""
        self._silent += 1
        self._silent_at_end += last
        self.dead = self._silent_at_end >= UNPROVEN
        self._changed.set()

    def refuse(self, asked: float) -> None:
        """Take note that the host wants fewer requests, and none for the seconds that it asked for."""
        now = time.monotonic()
        if now < self._next - self._interval:  # the answer to a request from before the pause
            return
        until = now + asked * random.uniform(*JITTER)
        learnt = (until - self._began) / self.allowed if self.allowed else FIRST_INTERVAL
        self._interval, self._next = max(self._interval, learnt), until


async def _wait(event: asyncio.Event, most: float | None = None) -> None:
    try:
        async with asyncio.timeout(most):
            await event.wait()
    except TimeoutError:
        return
