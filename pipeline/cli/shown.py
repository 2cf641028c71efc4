"""Print results of commands for people; `--json` prints the records themselves."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from microdit.pipeline.base.terminal import printable

if TYPE_CHECKING:  # `microdit --help` imports nothing heavy
    from microdit.pipeline.upkeep.gc import Garbage
    from microdit.pipeline.upkeep.status import CorpusStatus, SourceStatus


def print_rows(columns: list[str], rows: Sequence[Mapping[str, Any]], most: int = 100) -> None:
    """Print the first `most` rows as a table, numbers to the right."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        numeric = all(isinstance(row[name], int | float) for row in rows[:most])
        table.add_column(printable(name), justify="right" if rows and numeric else "left", overflow="fold")
    for row in rows[:most]:
        table.add_row(*("" if row[name] is None else printable(str(row[name])) for name in columns))
    console().print(table)
    if len(rows) > most:
        print(f"... {len(rows) - most:,} rows more; --json prints them all")


def console() -> Any:
    """Open standard output: as wide as the terminal, or as COLUMNS says, and as wide as a line needs elsewhere."""
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    as_it_is: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    if sys.stdout.isatty() or columns.isdecimal():
        return Console(**as_it_is)
    return Console(**as_it_is, width=1000)


def print_status(status: "CorpusStatus") -> None:
    """Print how far a corpus is: its sources, a table of its columns, and what was set aside."""
    print(printable(f"corpus {status.corpus} ({status.name}), shards of {status.shard_samples:,}"))
    for name, source in status.sources.items():
        print(printable(f"source {name}: {_units_read(source)} units read, {source.inputs:,} inputs"))
    rows = [
        {
            "column": column,
            "source": source,
            "done": entry.done,
            "left": entry.left,
            "aside": entry.set_aside,
            "stale": entry.stale,
            "in": entry.inputs,
            "out": entry.out,
            "failed": entry.failed,
            "size": in_bytes(entry.bytes),
            "images/s a worker": None if entry.rate is None else round(entry.rate, 1),
        }
        for column, by_source in status.columns.items()
        for source, entry in by_source.items()
    ]
    if rows:
        print()
        print_rows(list(rows[0]), rows, most=len(rows))
    for column, by_device in status.devices.items():
        named = (f"CPUs of {n} machines" if name == "cpu" else f"{n} x {name}" for name, n in by_device.items())
        print(printable(f"{column}: worked on {', '.join(named)}"))
    for failure in status.set_aside:
        shard, message = f"{failure.column}/{failure.source}/{failure.shard}", failure.message.partition("\n")[0]
        print(printable(f"set aside after {failure.attempts} attempts: {shard}: {message}"))


def _units_read(source: "SourceStatus") -> str:
    return f"{source.units_done:,}" if source.units is None else f"{source.units_done:,} of {source.units:,}"


def print_garbage(result: "Garbage") -> None:
    """Print what `gc` removed: every name, what it left alone, then the counts."""
    for name in result.names:
        print(printable(name))
    for folder in result.foreign:
        print(printable(f"left alone: {folder} is another corpus; `microdit gc` can be run on it"))
    if result.builds:
        print(f"{result.builds:,} builds are at work here: what is younger than 12 hours was left to them")
    counts = ", ".join(f"{getattr(result, sort):,} {sort}" for sort in ("attempts", "tables", "unfinished", "uploads"))
    print(f"{'would remove' if result.dry_run else 'removed'} {counts}; {in_bytes(result.bytes)}")


def in_bytes(size: float) -> str:
    """Write a number of bytes with a decimal unit: `4.1 kB`, `3.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
