"""Compute a column's distribution among chosen samples: bins of numbers, or the commonest values; called in workers."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from microdit.pipeline.explore.condition import Condition
from microdit.pipeline.explore.rows import quoted
from microdit.pipeline.explore.worker import WorkerView

VALUES = 30  # of a category that are named; the others are counted together
MOST_VALUES = 100_000  # that are counted at all
EXACT_ROWS = 4_000_000  # of a table that is read whole for a histogram
SAMPLED_ROWS = 1_500_000  # of a larger one that are read, in evenly spread parts
FEW = 20_000  # chosen rows of a sample, below which the whole table is read after all
SAMPLED_RUNS = 16  # parts of the table from which the quantiles of a column are estimated
SHARES = [0.0, 0.005, *(n / 100 for n in range(1, 100)), 0.995, 1.0]


def quantiles(view: WorkerView, columns: Sequence[str]) -> dict[str, list[float]]:
    """Estimate the quantiles `SHARES` of columns, from some parts of the table; empty if a column has no numbers."""
    parts = len(next(iter(view.view.table.parts.values()), []))
    runs = sorted({number * parts // SAMPLED_RUNS for number in range(SAMPLED_RUNS)}) if parts else []
    shares = ", ".join(map(str, SHARES))
    wanted = ", ".join(
        f"approx_quantile(x{n}, [{shares}]) FILTER (isfinite(x{n})) AS q{n}, "
        f"min(x{n}) FILTER (isfinite(x{n})) AS l{n}, max(x{n}) FILTER (isfinite(x{n})) AS h{n}"
        for n, _ in enumerate(columns)
    )
    chosen = ", ".join(f"{quoted(name)}::DOUBLE AS x{n}" for n, name in enumerate(columns))
    (row,) = view.rows(f"SELECT {wanted} FROM (SELECT {chosen} FROM samples) AS numbers", runs)
    found = {}
    for n, name in enumerate(columns):
        values = [] if row[f"q{n}"] is None else [float(value) for value in row[f"q{n}"]]
        if values:
            values[0], values[-1] = float(row[f"l{n}"]), float(row[f"h{n}"])
        found[name] = values
    return found


def edges_of(values: Sequence[float], bins: int) -> list[float]:
    """Choose the edges of at most so many bins of equal, round width between the outer quantiles of a column."""
    if not values:
        return []
    low, high = values[1], values[-2]
    if not high > low:
        low, high = values[0], values[-1]
    whole = all(value == math.floor(value) for value in values)
    width = (high + whole - low) / bins
    if not high > low:
        return [low, low + (1.0 if whole else abs(low) / 1000 or 1.0)]
    for step in _round_widths(width):
        if whole and (step < 1 or step != math.floor(step)):
            continue
        first, last = math.floor(low / step), math.ceil((high + whole) / step)
        edges = [float(f"{n * step:.10g}") for n in range(first, last + 1)] if last - first <= bins else []
        if edges and all(a < b for a, b in pairwise(edges)) and edges[0] <= low and edges[-1] >= high:
            return edges
    edges = [*(low + (high - low) * n / bins for n in range(bins)), high]
    return edges if all(a < b for a, b in pairwise(edges)) else [low, high]


def _round_widths(least: float) -> list[float]:
    """List round widths of bins of about this one and more; none if it is too small for a logarithm's power."""
    if least < 1e-290:
        return []
    power = 10.0 ** math.floor(math.log10(least))
    return [shape * scale for scale in (power, 10 * power) for shape in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5)]


def sampled_runs(view: WorkerView, condition: Condition) -> tuple[list[int] | None, float]:
    """Choose parts of a large table that stand for all of it, and how many times their rows it has; None is all."""
    rows = view.view.files.rows()
    if not condition.by_row or sum(rows) <= EXACT_ROWS:
        return None, 1.0
    step = max(2, round(sum(rows) / SAMPLED_ROWS))
    runs = list(range(step // 2, len(rows), step))
    read = sum(rows[number] for number in runs)
    return (runs, sum(rows) / read) if read else (None, 1.0)


def bins(view: WorkerView, column: str, condition: Condition, edges: Sequence[float]) -> dict[str, Any]:
    """Count numbers in bins; those beyond the edges count in the outermost ones.

    Of a large table the counts are estimates from some of its parts (`estimated`), unless few rows are chosen.
    """
    most = len(edges) - 2
    bin_of = "NULL::INTEGER"
    if edges:
        low, step = edges[0], (edges[-1] - edges[0]) / (len(edges) - 1)
        bin_of = (
            f"CASE WHEN isfinite(x) THEN greatest(least(floor((x - ({low!r})) / {step!r} + 1e-9), {most}), 0)::INTEGER "
            "END"
        )
    sql = (
        f"SELECT {bin_of} AS value, count(*) AS n "
        f"FROM (\n{condition.choose(f'{quoted(column)}::DOUBLE AS x')}) AS numbers GROUP BY 1"
    )
    rows, estimated = _counted(view, condition, sql)
    counts, nulls = [0] * max(len(edges) - 1, 0), 0
    for value, n in rows:
        if value is None:
            nulls += n
        else:
            counts[value] += n
    return {"kind": "bins", "edges": list(edges), "counts": counts, "nulls": nulls, "estimated": estimated}


def _counted(view: WorkerView, condition: Condition, sql: str) -> tuple[list[tuple[Any, int]], bool]:
    """Run a query that counts (`value`, `n`), on a sample of a large table; also tells whether these are estimates."""
    runs, factor = sampled_runs(view, condition)
    rows = view.rows(sql, runs)
    if runs is not None and sum(int(row["n"]) for row in rows) < FEW:
        runs, factor, rows = None, 1.0, view.rows(sql)
    return [(row["value"], round(int(row["n"]) * factor)) for row in rows], runs is not None


def values(view: WorkerView, column: str, condition: Condition) -> dict[str, Any]:
    """Count the commonest values of a category or a flag; estimates as `bins` has them."""
    chosen = condition.choose(f"{quoted(column)} AS value")
    sql = (
        f"SELECT value, n FROM (SELECT value, count(*) AS n FROM (\n{chosen}) AS chosen GROUP BY 1) AS counted "
        f"ORDER BY value IS NULL DESC, n DESC LIMIT {MOST_VALUES}"
    )
    rows, estimated = _counted(view, condition, sql)
    nulls = sum(n for value, n in rows if value is None)
    named = sorted(((value, n) for value, n in rows if value is not None), key=lambda one: (-one[1], str(one[0])))
    return {
        "kind": "values",
        "values": [{"value": value, "rows": n} for value, n in named[:VALUES]],
        "others": sum(n for _, n in named[VALUES:]),
        "nulls": nulls,
        "estimated": estimated,
    }
