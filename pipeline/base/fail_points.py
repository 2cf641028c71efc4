"""Fail points: a test names one in the environment, and the process kills itself when it reaches it."""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def fail_point(name: str) -> None:
    """Kill this process with SIGKILL if MICRODIT_FAIL_POINT is `<name>:<n>` and this is the n-th call with the name.

    The names are steps of a shard's life, so that tests stop a writer at an exact step.
    """
    wanted, _, number = os.environ.get("MICRODIT_FAIL_POINT", "").partition(":")
    if wanted == name:
        _passed[name] += 1
        if _passed[name] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
