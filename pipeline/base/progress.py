"""Progress of a build: figures by stage, as a live table on a terminal and as lines of JSON elsewhere."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from microdit.pipeline.base.terminal import printable, printable_json

RATE_WINDOW = 30.0  # seconds over which rates are measured
LINE_EVERY = 60.0  # seconds between two lines of JSON


@dataclass
class Line:
    """Figures of one stage; rates and times are None while they are not known."""

    name: str
    what: str
    """The unit of the counts: `shards`, or `units` for ingest."""
    done: int = 0
    total: int = 0
    more: bool = False
    """The total will grow."""
    aside: int = 0
    """Set aside."""
    running: int = 0
    workers: int = 0
    """Actors that hold a model."""
    samples: int = 0
    """Images of this run, of which so many"""
    failed: int = 0
    rate: float | None = None
    """Images a second."""
    bytes_rate: float | None = None
    """Bytes written a second."""
    busy: float | None = None
    """The share of their time in which the models work."""
    left: float | None = None
    """Seconds."""
    state: str = ""


@dataclass
class Snapshot:
    """The state of a build: seconds since it began, its stages, and messages since the last snapshot."""

    seconds: float
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


Progress = Callable[[Snapshot], None]


@dataclass
class Rates:
    """Shards, images, bytes and seconds of models' work per second over the last `RATE_WINDOW`; None if unknown."""

    jobs: float | None = None
    samples: float | None = None
    bytes: float | None = None
    busy: float | None = None


class Tally:
    """A stage's work in this run, and its rates of now."""

    def __init__(self) -> None:
        self.jobs = self.samples = self.failed = 0
        self.began: float | None = None
        self._recent: deque[tuple[float, int, int, int, float]] = deque()

    def begin(self) -> None:
        """Start the clock, at the stage's first job."""
        if self.began is None:
            self.began = time.monotonic()

    def add(self, jobs: int = 0, samples: int = 0, failed: int = 0, size: int = 0, busy: float = 0.0) -> None:
        """Count work that is done: `size` in bytes, `busy` in seconds of a model's work."""
        self.jobs += jobs
        self.samples += samples
        self.failed += failed
        self._recent.append((time.monotonic(), jobs, samples, size, busy))

    def rates(self) -> Rates:
        """Return the rates over the last `RATE_WINDOW` seconds."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RATE_WINDOW:
            self._recent.popleft()
        if self.began is None or not self._recent:
            return Rates()
        span = max(now - max(self.began, now - RATE_WINDOW), 1e-3)
        return Rates(*(sum(entry[i] for entry in self._recent) / span for i in range(1, 5)))


def duration(seconds: float | None) -> str:
    """Format seconds: `0:42`, `12:05`, `3 h 20 min`, `2 d 4 h`."""
    if seconds is None:
        return ""
    seconds = int(seconds)
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d}"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def number(value: float | None) -> str:
    """Format a figure for people: `1,918`, `42`, `3.1`."""
    if value is None:
        return ""
    return f"{value:.1f}" if 0 < value < 10 and value != int(value) else f"{value:,.0f}"


def as_table(snapshot: Snapshot) -> Table:
    """Return the stages as a table for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name, justify in (("stage", "left"), ("done", "right"), ("", "left"), ("images", "right"), ("failed", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("images/s", "MB/s", "busy", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for line in snapshot.lines:
        table.add_row(
            Text(printable(line.name)),
            f"{line.done:,}/{line.total:,}{'+' if line.more else ''}",
            line.what,
            number(line.samples),
            number(line.failed) if line.failed else "",
            number(line.rate),
            number(None if line.bytes_rate is None else line.bytes_rate / 1e6),
            "" if line.busy is None else f"{line.busy:.0%}",
            duration(line.left),
            Text(printable(line.state), style="red" if line.aside else "dim"),
        )
    return table


def as_json(snapshot: Snapshot) -> str:
    """Return a snapshot as one line of JSON: `seconds`, and `stages` with the fields of `Line`."""

    def rounded(value: Any) -> Any:
        return round(value, 3) if isinstance(value, float) else value

    stages = [{name: rounded(value) for name, value in asdict(line).items()} for line in snapshot.lines]
    return json.dumps({"seconds": round(snapshot.seconds, 1), "stages": stages})


@contextmanager
def shown(console: Console | None = None) -> Iterator[Progress]:
    """Show a build's progress on a console (standard error if None).

    On a terminal it is a live table; elsewhere lines of JSON, one a minute and a last one, and between them
    `{"note": ...}` for each message.
    """
    console = console or Console(stderr=True)
    last: list[Snapshot] = []
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:

            def draw(snapshot: Snapshot) -> None:
                for note in snapshot.notes:
                    live.console.print(printable(note), markup=False, emoji=False, highlight=False)
                if snapshot.lines:
                    last[:] = [snapshot]
                live.update(as_table(snapshot))

            yield draw
        if last:
            console.print(as_table(last[0]))
        return
    printed = -LINE_EVERY

    def print_line(text: str) -> None:
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def write(snapshot: Snapshot) -> None:
        nonlocal printed
        for note in snapshot.notes:
            print_line(printable_json({"note": note}))
        last[:] = [snapshot] if snapshot.lines else last
        if snapshot.lines and snapshot.seconds - printed >= LINE_EVERY:
            printed = snapshot.seconds
            print_line(as_json(snapshot))

    yield write
    if last and last[0].seconds > printed:
        print_line(as_json(last[0]))
