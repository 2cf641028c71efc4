"""Fail points: a test names one in the environment, and the process kills itself there."""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def fail_point(name: str) -> None:
    """A step of a shard's life. Where MICRODIT_FAIL_POINT says `<name>:<n>`, the process is killed when it comes by
    for the n-th time: so tests stop a writer exactly there."""
    wanted, _, number = os.environ.get("MICRODIT_FAIL_POINT", "").partition(":")
    if wanted == name:
        _passed[name] += 1
        if _passed[name] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
