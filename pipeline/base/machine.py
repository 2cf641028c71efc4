"""Tell processes of this machine from those of others, and living ones from dead."""

import os
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any


@cache
def machine() -> str | None:
    """Name what numbers the processes here: the machine since its last start, and the container; None if unknown."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return None


def this_process() -> dict[str, Any]:
    """Describe this process for others, as JSON."""
    return {"machine": machine(), "host": socket.gethostname(), "pid": os.getpid()}


def has_died(process: dict[str, Any]) -> bool:
    """Return True if what `this_process` described was a process of this machine, and is no more.

    Raises:
        KeyError, TypeError, ValueError: it is no such description.
    """
    name, pid = process["machine"], int(process["pid"])
    return name is not None and name == machine() and not Path(f"/proc/{pid}").exists()
