"""Show `verify` to people: a bar while it reads, then what it found."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.shown import in_bytes

if TYPE_CHECKING:  # `microdit --help` imports nothing heavy
    from microdit.pipeline.upkeep.verify import Verification


@contextmanager
def verify_progress() -> Iterator[Callable[[int, int, int], None]]:
    """Show shards, MB/s and the time left on a terminal (standard error); elsewhere nothing."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, began = Console(stderr=True), time.monotonic()
    with Progress(
        TextColumn("verify"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("verify", total=None, rate="")

        def update(done: int, of: int, size: int) -> None:
            rate = size / max(time.monotonic() - began, 1e-3)
            bar.update(task, completed=done, total=of, rate=f"{in_bytes(rate)}/s")

        yield update


def print_verification(result: "Verification") -> None:
    """Print every problem, the samples of each column, and the totals."""
    from microdit.pipeline.upkeep.problem import WARNINGS

    for problem in result.problems:
        print(printable(str(problem)))
    for column, samples in result.totals.samples.items():
        print(printable(f"{column}: in {samples.inputs:,} = out {samples.out:,} + failed {samples.failed:,}"))
    totals = result.totals
    if (part := result.part) is not None:
        asked = [f"columns {', '.join(part.columns)}"] if part.columns else []
        asked += [f"source {part.source}"] if part.source is not None else []
        asked += [f"a share of {part.sample:g} of the shards"] if part.sample < 1 else []
        other = f" by seed {part.seed} (another --seed draws others)" if part.sample < 1 else ""
        print(printable(f"checked: {', '.join(asked)}{other}; tables and selections were not"))
    warnings = sum(problem.kind in WARNINGS for problem in result.problems)
    print(
        f"{totals.shards:,} shards, {totals.commits:,} commits, {totals.units:,} units, "
        f"{in_bytes(totals.bytes)}: {len(result.problems) - warnings:,} problems"
        f"{f' and {warnings:,} warnings' if warnings else ''}"
    )
