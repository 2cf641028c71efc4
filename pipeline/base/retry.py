"""Pauses between the tries of a request that fails for a transient reason, and what a server's Retry-After asks for."""

import math
import random
import re
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

SECONDS = re.compile(r"\d+(\.\d+)?")
LONGEST_ASKED = 1e9  # seconds; callers have limits of their own below it


class Backoff:
    """Compute the pauses after the failures of one request. It does not sleep, so that asyncio can use it as well.

    Args:
        first: seconds before the second try; each further pause is twice as long.
        longest: seconds that no pause exceeds, before the jitter.
        jitter: the range of the random factor of each pause: not all clients come back at once.
        tries: give up with this failure, counted since the last `reset`.
    """

    def __init__(
        self,
        first: float,
        longest: float = math.inf,
        jitter: tuple[float, float] = (1.0, 1.0),
        tries: int | None = None,
    ):
        self._first, self._longest, self._jitter, self._tries = first, longest, jitter, tries
        self._began = time.monotonic()
        self.waited = 0.0  # seconds from the beginning to the last failure
        self.reset()

    def reset(self) -> None:
        """Begin again with the shortest pause: there was progress."""
        self.failures, self._next = 0, self._first

    def next_pause(self, patience: float = math.inf) -> float | None:
        """Count a failure; return the seconds to wait before the next try, or None to give up.

        Args:
            patience: seconds since the beginning after which no further try may begin.
        """
        self.failures += 1
        self.waited = time.monotonic() - self._began
        pause = min(self._next, self._longest)
        if self.failures == self._tries or self.waited + pause > patience:
            return None
        self._next = 2 * pause
        return pause * random.uniform(*self._jitter)


def retry_after(header: str | None) -> float | None:
    """Parse a Retry-After header, which is seconds or an HTTP date; return the seconds from now, None if it is neither.

    A date in the past counts as 0 seconds.
    """
    text = (header or "").strip()
    if SECONDS.fullmatch(text):
        return min(float(text), LONGEST_ASKED)
    try:
        when = parsedate_to_datetime(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
