"""Pause the reading of a source whose servers fail wholesale, and leave its units unread if they do not recover.

A server that is gone fails every URL that it is asked for: what is not read yet is better left to a later build.
No ray here.
"""

import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from microdit.pipeline.corpus.reasons import OF_SERVERS, in_words
from microdit.pipeline.engine.messages import ShardWork

LEAST = 100  # inputs that a rate of failures is computed from
WHOLESALE = 0.9  # the share of them that servers are at fault for if the source itself is gone
PAUSE = 60.0  # seconds before one unit is tried again; twice as long before each further one
TRIES = 3  # units that are tried so, one after the other, before the source is left


@dataclass
class _State:
    recent: deque[ShardWork] = field(default_factory=deque)
    inputs: int = 0
    failed: int = 0
    warned: bool = False
    tries: int = 0
    """Pauses since the source was sound."""
    until: float | None = None
    """Time of the next try, by the monotonic clock; None if it is sound."""
    left: bool = False


class FailingSources:
    """The failures of each source of a build, looked at as its shards come.

    Args:
        max_failures: the share of a source's inputs that the config lets fail.
    """

    def __init__(self, max_failures: float):
        self._max_failures = max_failures
        self._states: dict[str, _State] = defaultdict(_State)

    def add(self, source: str, work: ShardWork) -> str | None:
        """Count a shard of a source; return a line for people if something is to be said about it."""
        state = self._states[source]
        state.inputs += work.inputs
        state.failed += work.failed
        state.recent.append(work)
        while sum(shard.inputs for shard in state.recent) - state.recent[0].inputs >= LEAST:
            state.recent.popleft()
        inputs, gone = sum(shard.inputs for shard in state.recent), sum(map(_gone, state.recent))
        if state.until is not None and _gone(work) < WHOLESALE * work.inputs:
            state.until, state.tries = None, 0
            state.recent = deque([work])
            return f"source {source}: it answers again, and is read on"
        enough = inputs >= LEAST or state.tries > 0
        if enough and gone >= WHOLESALE * inputs and not state.left and self._is_over(state):
            return self._pause(source, state, inputs, gone)
        if (
            state.until is None
            and not state.warned
            and state.inputs >= LEAST
            and state.failed > self._max_failures * state.inputs
        ):
            state.warned = True
            share = state.failed / state.inputs
            return (
                f"source {source}: {share:.1%} of {state.inputs:,} inputs have failed so far, the config allows "
                f"max_failures = {self._max_failures}"
            )
        return None

    def may_read(self, source: str, reading: int) -> bool:
        """Return True if a unit of a source may be read now; `reading` units of it are being read."""
        state = self._states[source]
        if state.left or state.until is None:
            return not state.left
        return self._is_over(state) and reading == 0

    @property
    def left(self) -> list[str]:
        """The sources of which no further unit is to be read by this build."""
        return [source for source, state in self._states.items() if state.left]

    @staticmethod
    def _is_over(state: _State) -> bool:
        return state.until is None or time.monotonic() >= state.until

    def _pause(self, source: str, state: _State, inputs: int, gone: int) -> str:
        reasons = in_words(sum((Counter(shard.reasons) for shard in state.recent), Counter[str]()))
        what = f"source {source}: {gone:,} of the last {inputs:,} inputs failed ({reasons})"
        if state.tries == TRIES:
            state.left = True
            return (
                f"{what}, and the pauses did not help: its other units are left unread. Run the same command again "
                "when it answers, with --retry-failed for what failed for a transient reason"
            )
        pause = PAUSE * 2**state.tries
        state.until, state.tries = time.monotonic() + pause, state.tries + 1
        state.recent.clear()
        return f"{what}: it is not read for {pause:.0f} s, then one unit is tried"


def _gone(work: ShardWork) -> int:
    """Count the inputs of a shard that servers failed to give."""
    return sum(count for reason, count in work.reasons.items() if OF_SERVERS.fullmatch(reason))
