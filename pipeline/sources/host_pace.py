"""Learn how often a host may be asked, and whether it answers at all."""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable

UNPROVEN = 8  # requests at once to a host that has not answered yet
RETRIED = 16  # and to one that was silent and is tried again
SILENT = 3  # requests in a row without any answer after which a host that has answered before is put off
MEMORY = 300.0  # seconds for which a process knows that a host was silent
KNOWN_SILENT = 3  # units in a row that found a host silent, after which the next ones do not ask it for a while
REST = 10.0  # seconds of that while, doubled with each further unit that finds it silent
MOST_KNOWN = 100_000
JITTER = (1.0, 1.25)
FIRST_INTERVAL = 0.1  # seconds between the requests to a host that refused its first ones
FASTER = 0.99  # the factor of the interval with each answer: a host that refused once may allow more later
PATIENCE = 300.0  # seconds that a request waits for its host's pace

_silent_hosts: dict[str, tuple[float, int]] = {}
"""For this process' next units: when hosts that never answered were last found silent, and by how many units."""


class HostPace:
    """The requests to one host: how many are open, when the next may begin, how many found it silent.

    Args:
        name: the host, with its port.
        at_end: tells whether nothing is left to begin but the URLs of silent hosts; call `proceed` when that changes.
    """

    def __init__(self, name: str, at_end: Callable[[], bool]) -> None:
        self._name, self._at_end = name, at_end
        when, self._units = _silent_hosts.get(name, (0.0, 0))
        since = time.monotonic() - when
        self.suspect = self._units > 0 and since < MEMORY
        """It was silent in an earlier unit of this process, and has not answered since: it is tried shortly, once."""
        rest = REST * 2 ** (self._units - KNOWN_SILENT) if self._units >= KNOWN_SILENT else 0.0
        self.dead = self.suspect and since < min(rest, MEMORY)
        """It was silent when it was tried again, or in several units just now: its other URLs fail at once."""
        self.allowed = 0
        """Requests that it did not refuse."""
        self._silent = self._silent_at_end = self._open = 0
        self._proven = self._late = False
        self._began = time.monotonic()
        self._interval, self._next = 0.0, 0.0
        self._waiters: deque[tuple[asyncio.Future[bool], float]] = deque()  # and how long they wait at most
        self._timer: asyncio.TimerHandle | None = None

    @property
    def put_off(self) -> bool:
        return self._silent >= (SILENT if self._proven else 1)

    @property
    def new(self) -> bool:
        """Tell whether it is open if it answers."""
        return not self._proven and not self.put_off

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiters)

    async def begin(self) -> bool:
        """Wait for the turn of a request: for the host's pace, or at a silent host for the end of the unit.

        Returns:
            False if the host is dead, or allows so few requests that the turn does not come.
        """
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiters.append((turn, time.monotonic() + PATIENCE))
        self.proceed()
        return await turn

    def proceed(self) -> None:
        """Let the requests begin whose turn it is, in their order."""
        while self._waiters:
            turn, until = self._waiters[0]
            now = time.monotonic()
            if turn.done():  # its task was cancelled
                self._waiters.popleft()
            elif self.dead or (self._interval and max(self._next, now) > until):
                self._waiters.popleft()
                turn.set_result(False)
            elif (self.put_off and not self._at_end()) or self._open >= self._most():
                return
            elif self._next > now:
                if self._timer is None:
                    self._timer = turn.get_loop().call_later(self._next - now, self._on_time)
                return
            else:
                self._waiters.popleft()
                self._open += 1
                self._next = max(self._next, now) + self._interval
                turn.set_result(True)

    def _most(self) -> float:
        """Return how many requests may be open: none but those that are there while a new host keeps them waiting."""
        if self.put_off:
            return RETRIED
        return math.inf if self._proven else 0 if self._late else UNPROVEN

    def _on_time(self) -> None:
        self._timer = None
        self.proceed()

    def end(self) -> None:
        """Take note that a request is over."""
        self._open -= 1
        self.proceed()

    def late(self) -> None:
        """Take note that an answer lets itself be waited for: of a new host the next ones would, too."""
        self._late = True

    def heard(self) -> None:
        """Take note that an answer begins."""
        self._silent = self._silent_at_end = 0
        if not self._proven or self.dead:
            self._proven, self.dead, self.suspect = True, False, False
            _silent_hosts.pop(self._name, None)
        self.proceed()

    def allow(self) -> None:
        """Take note that a request was not refused."""
        self.allowed += 1
        self._interval *= FASTER

    def silent(self, last: bool) -> None:
        """Take note that no answer came; `last`: at the end of the unit, where a host that stays silent is given up."""
        self._silent += 1
        self._silent_at_end += last
        self.dead = self.suspect or self._silent_at_end >= RETRIED
        if not self._proven and len(_silent_hosts) < MOST_KNOWN:
            _silent_hosts[self._name] = time.monotonic(), self._units + 1
        self.proceed()

    def refuse(self, asked: float) -> None:
        """Take note that the host wants fewer requests, and none for the seconds that it asked for."""
        now = time.monotonic()
        if now < self._next - self._interval:  # the answer to a request from before the pause
            return
        until = now + asked * random.uniform(*JITTER)
        learnt = (until - self._began) / self.allowed if self.allowed else FIRST_INTERVAL
        self._interval, self._next = max(self._interval, learnt), until
