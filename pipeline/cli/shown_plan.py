"""Print a plan for people: tables of sources, columns and stages, totals, and everything that was assumed."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from microdit.pipeline.base.terminal import printable
from microdit.pipeline.estimate.result import Estimate


def show(estimate: Estimate, console: Console, size: Callable[[float], str]) -> None:
    """Print an estimate; `size` formats bytes."""

    def write(text: str = "") -> None:
        console.print(printable(text), soft_wrap=True)

    machines, time, money = estimate.machines, estimate.time, estimate.money
    gpus = f", {machines.gpus} GPUs ({machines.gpu})" if machines.gpus else ", no GPU"
    write(f"plan of {estimate.name}: shards of {estimate.shard_samples:,}, {machines.cpus:g} CPUs{gpus}")
    write(f"learned from {estimate.learned_from or 'no earlier build: name one with --from CORPUS for better numbers'}")
    _table(
        console,
        ("source", "units", "inputs", "shards", "fetched", "known from"),
        [
            (name, f"{one.units:,}", f"{one.inputs:,}", f"{one.shards:,}",
             "" if one.fetched_bytes is None else size(one.fetched_bytes), one.origin)
            for name, one in estimate.sources.items()
        ],
    )  # fmt: skip
    _table(
        console,
        ("column", "good", "failed", "bytes", "known from"),
        [
            (name, f"{one.out:,}", f"{one.failed:,}", size(one.bytes), one.origin)
            for name, one in estimate.columns.items()
        ],
    )
    _table(
        console,
        ("stage", "on", "at once", "CPU time", "GPU time", "alone", "inputs/s", "known from"),
        [
            (name, str(one.device), f"{one.workers:g}", duration(one.cpu_seconds),
             "" if one.device == "cpu" else duration(one.gpu_seconds), duration(one.seconds),
             "?" if one.rate is None else f"{one.rate:,.1f}", one.origin)
            for name, one in estimate.stages.items()
        ],
    )  # fmt: skip
    write()
    least = "at least " if time.not_measured else ""
    write(f"bytes   {size(estimate.bytes)} in {estimate.shards:,} shards of {len(estimate.columns)} columns")
    write(f"time    {least}{duration(time.seconds)}; the bottleneck: {time.narrowest}")
    if time.not_measured:
        write(f"        not measured, and not in it: {', '.join(time.not_measured)}")
    if guessed := [name for name, one in estimate.stages.items() if "by arithmetic" in one.origin]:
        write(f"        in it by arithmetic, not measured: {', '.join(guessed)}")
    gpu = "?" if money.gpus is None else f"${money.gpus:,.2f}"
    build = f"{least}${money.build:,.2f}" if money.build is not None else "not known"
    write(f"money   {build} (GPUs {gpu}, CPUs ${money.cpus:,.2f}); kept: ${money.storage_a_month:,.2f} a month")
    write("\nassumed:")
    for line in estimate.assumptions:
        write(f"  - {line}")


def duration(seconds: float | None) -> str:
    """Write seconds with a unit: `45 s`, `12.5 min`, `3.4 h`, `12.0 days`; `?` if they are not known."""
    if seconds is None:
        return "?"
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"


def _table(console: Console, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, name in enumerate(names):
        wide = i == len(names) - 1
        words = i == 0 or wide or name == "on"
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not wide)
    for row in rows:
        table.add_row(*map(printable, row))
    console.print()
    console.print(table)
