"""How far a build is: figures by stage, drawn live on a terminal and as plain lines elsewhere."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

RATE_WINDOW = 30.0  # seconds over which images/s are counted
LINE_EVERY = 10.0  # seconds between two plain lines


@dataclass
class Line:
    """One stage: `done` of `total` shards (of units, for ingest), and the images of this run.

    `more` says that the total is what is known so far. `rate` is images a second, `left` seconds; None if not known.
    """

    name: str
    what: str
    done: int = 0
    total: int = 0
    more: bool = False
    aside: int = 0
    running: int = 0
    workers: int = 0
    samples: int = 0
    failed: int = 0
    rate: float | None = None
    left: float | None = None
    state: str = ""


@dataclass
class Snapshot:
    """The state of a build: seconds since it began, its stages, and what there is to say since the last one."""

    seconds: float
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


Progress = Callable[[Snapshot], None]


class Tally:
    """What a stage did in this run, and how fast it is now."""

    def __init__(self) -> None:
        self.jobs = self.samples = self.failed = 0
        self.began: float | None = None
        self._recent: deque[tuple[float, int, int]] = deque()

    def begin(self) -> None:
        """The stage has work in hand."""
        if self.began is None:
            self.began = time.monotonic()

    def add(self, jobs: int = 0, samples: int = 0, failed: int = 0) -> None:
        self.jobs += jobs
        self.samples += samples
        self.failed += failed
        self._recent.append((time.monotonic(), jobs, samples))

    def rates(self) -> tuple[float | None, float | None]:
        """Shards and images a second over the last half minute."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RATE_WINDOW:
            self._recent.popleft()
        if self.began is None or not self._recent:
            return None, None
        span = max(now - max(self.began, now - RATE_WINDOW), 1e-3)
        return sum(e[1] for e in self._recent) / span, sum(e[2] for e in self._recent) / span


def duration(seconds: float | None) -> str:
    """`0:42`, `12:05`, `3 h 20 min`, `2 d 4 h`."""
    if seconds is None:
        return ""
    seconds = int(seconds)
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d}"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def number(value: float | None) -> str:
    """A figure as people read it: `1,918`, `42`, `3.1`."""
    if value is None:
        return ""
    return f"{value:.1f}" if 0 < value < 10 and value != int(value) else f"{value:,.0f}"


def as_table(snapshot: Snapshot) -> Table:
    """The stages as a table for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name, justify in (("stage", "left"), ("done", "right"), ("", "left"), ("images", "right"), ("failed", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("images/s", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for line in snapshot.lines:
        state = f"[red]{line.state}[/]" if line.aside else f"[dim]{line.state}[/]"
        table.add_row(
            line.name,
            f"{line.done:,}/{line.total:,}{'+' if line.more else ''}",
            line.what,
            number(line.samples),
            number(line.failed) if line.failed else "",
            number(line.rate),
            duration(line.left),
            state,
        )
    return table


def as_text(snapshot: Snapshot) -> str:
    """The stages that have something to say, in one line."""
    parts = []
    for line in snapshot.lines:
        if line.done >= line.total and not line.more and not line.aside:
            continue
        text = f"{line.name} {line.done}/{line.total}{'+' if line.more else ''} {line.what}"
        if line.rate:
            text += f" {number(line.rate)} images/s"
        if line.left:
            text += f" {duration(line.left)} left"
        if line.aside:
            text += f" {line.aside} set aside"
        parts.append(text)
    return f"[{duration(snapshot.seconds)}] " + ("; ".join(parts) or "all done")


@contextmanager
def shown(console: Console | None = None) -> Iterator[Progress]:
    """Show a build's progress on a console (standard error if None).

    On a terminal that is a live table, elsewhere a line every 10 seconds.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            last: list[Snapshot] = []

            def draw(snapshot: Snapshot) -> None:
                for note in snapshot.notes:
                    live.console.print(note, markup=False, highlight=False)
                if snapshot.lines:
                    last[:] = [snapshot]
                live.update(as_table(snapshot))

            yield draw
        if last:
            console.print(as_table(last[0]))
        return
    printed = -LINE_EVERY

    def write(snapshot: Snapshot) -> None:
        nonlocal printed
        for note in snapshot.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        if snapshot.lines and snapshot.seconds - printed >= LINE_EVERY:
            printed = snapshot.seconds
            console.print(as_text(snapshot), markup=False, highlight=False, soft_wrap=True)

    yield write
