"""How the command line shows answers to people; `--json` prints them as they are."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any


def print_rows(columns: list[str], rows: Sequence[Mapping[str, Any]], most: int = 100) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        numeric = all(isinstance(row[name], int | float) for row in rows[:most])
        table.add_column(name, justify="right" if rows and numeric else "left", overflow="fold")
    for row in rows[:most]:
        table.add_row(*("" if row[name] is None else str(row[name]) for name in columns))
    console().print(table, markup=False)
    if len(rows) > most:
        print(f"... {len(rows) - most:,} rows more; --json prints them all")


def console() -> Any:
    """Standard output: as wide as the terminal, and as wide as it likes elsewhere."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=1000)


def print_status(found: Mapping[str, Any]) -> None:
    print(f"corpus {found['corpus']} ({found['name']}), shards of {found['shard_samples']:,}")
    for name, source in found["sources"].items():
        units = (
            f"{source['units_done']:,} units read"
            if source["units"] is None
            else (f"{source['units_done']:,} of {source['units']:,} units read")
        )
        print(f"source {name}: {units}, {source['inputs']:,} inputs")
    rows = [
        {
            "column": column,
            "source": source,
            "done": entry["done"],
            "left": entry["left"],
            "aside": entry["set_aside"],
            "stale": entry["stale"],
            "in": entry["in"],
            "out": entry["out"],
            "failed": entry["failed"],
            "size": in_bytes(entry["bytes"]),
            "images/s a worker": None if entry["rate"] is None else round(entry["rate"], 1),
        }
        for column, sources in found["columns"].items()
        for source, entry in sources.items()
    ]
    if rows:
        print()
        print_rows(list(rows[0]), rows, most=len(rows))
    for entry in found["set_aside"]:
        where, message = f"{entry['column']}/{entry['source']}/{entry['shard']}", entry["message"].splitlines()[0]
        print(f"set aside after {entry['attempts']} attempts: {where}: {message}")


def in_bytes(size: float) -> str:
    """`4.1 kB`, `3.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def print_verified(found: Mapping[str, Any]) -> None:
    totals = found["totals"]
    for problem in found["problems"]:
        print(f"{problem['kind']}: {problem['what']}: {problem['detail']}")
    for column, samples in totals["samples"].items():
        print(f"{column}: in {samples['in']:,} = out {samples['out']:,} + failed {samples['failed']:,}")
    print(
        f"{totals['shards']:,} shards, {totals['commits']:,} commits, {totals['units']:,} units, "
        f"{in_bytes(totals['bytes'])}: {len(found['problems']):,} problems"
    )
