"""A file of JSON objects, one a line, that neither a full disk nor a kill spoils."""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MOST_WAITING = 100_000  # lines in memory; more push out the oldest
MOST_STARTS = 16  # at which a line that is no JSON is tried


class JsonLines:
    """Appends lines. Those for which the disk has no room wait in memory and come with a later one."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: deque[str] = deque(maxlen=MOST_WAITING)

    def append(self, value: Mapping[str, Any]) -> OSError | None:
        """Write a line, after those that wait. Returns why they wait still, or None."""
        self.waiting.append(json.dumps(plain(value), allow_nan=False) + "\n")
        return self.write()

    def write(self) -> OSError | None:
        """Write the lines that wait: all or none. Returns why not, or None."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                torn = end and os.pread(file.fileno(), 1, end - 1) != b"\n"  # by a kill
                left = memoryview((("\n" if torn else "") + "".join(self.waiting)).encode())
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            return error
        self.waiting.clear()
        return None

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the lines that are not wanted and what a kill tore; a whole line behind a torn one stays.

        Raises:
            OSError: that cannot be written; the file is as it was.
        """
        if not self.path.exists():
            return
        before = self.path.read_bytes()
        found = (_whole_object(line, wanted) for line in before.decode(errors="replace").split("\n"))
        after = "".join(json.dumps(plain(one)) + "\n" for one in found if one is not None).encode()
        if before.startswith(after):
            os.truncate(self.path, len(after))  # for which a full disk has room
            return
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            partial.write_bytes(after)
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)


def _whole_object(line: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """Find the wanted object at the end of a line."""
    start = 0
    for _ in range(MOST_STARTS):
        try:
            found = json.loads(line[start:])
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and wanted(found):
            return found
        if (start := line.find('{"', start + 1)) < 0:
            break
    return None


def plain(value: Any) -> Any:
    """Put None in place of numbers that are not finite, at any depth."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
