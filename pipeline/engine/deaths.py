"""Find out why a worker's process is gone."""

import time
from dataclasses import dataclass
from typing import Literal

import ray

from microdit.pipeline.base.errors import first_line
from microdit.pipeline.engine import cluster
from microdit.pipeline.engine.messages import ErrorReport


@dataclass(frozen=True)
class Death:
    """Why a process is gone: an error around the stage, a lost node or lack of memory, a hang, or a crash."""

    cause: Literal["raised", "lost", "stall", "crash"]
    node_gone: bool
    error: ErrorReport


def explain_death(error: ray.exceptions.RayError, node: str | None, began: float | None, stall_timeout: float) -> Death:
    """Explain Ray's error.

    Args:
        node: the node that the process ran on, if known.
        began: when its job began, on the clock of `time.monotonic`.
        stall_timeout: seconds without headway after which a process ends itself.
    """
    node_gone = isinstance(error, ray.exceptions.NodeDiedError) or (node is not None and not cluster.is_alive(node))
    cause: Literal["raised", "lost", "stall", "crash"] = "crash"
    message = f"the process that worked on it died: {first_line(error)}"
    if isinstance(error, ray.exceptions.RayTaskError):
        cause, message = "raised", str(error.cause)
    elif node_gone or isinstance(error, ray.exceptions.OutOfMemoryError):
        cause = "lost"
    # a process that hangs ends after the whole of the timeout; the message that it had begun may have come late
    elif began is not None and time.monotonic() - began >= stall_timeout / 2:
        cause, message = "stall", f"no sample was done within {stall_timeout:g} s, and the process was ended"
    return Death(cause, node_gone, ErrorReport(message, str(error)))
