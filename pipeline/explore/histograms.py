"""How a column is spread among chosen samples: bins of numbers, or the commonest values; called in workers."""

import math
from collections.abc import Sequence
from typing import Any

from microdit.pipeline.explore.condition import Condition
from microdit.pipeline.explore.rows import quoted
from microdit.pipeline.explore.worker import WorkerView

VALUES = 30  # of a category that are named; the others are counted together
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
    if not high > low:
        return [low, low + 1.0] if whole else [low, low + (abs(low) / 1000 or 1.0)]
    rough = (high + whole - low) / bins
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [shape * scale for scale in (power, 10 * power) for shape in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5)]
    for step in steps:
        if whole and (step < 1 or step != math.floor(step)):
            continue
        first, last = math.floor(low / step), math.ceil((high + whole) / step)
        if last - first <= bins:
            return [float(f"{n * step:.10g}") for n in range(first, last + 1)]
    return [low + (high - low) * n / bins for n in range(bins + 1)]


def bins(view: WorkerView, column: str, condition: Condition, edges: Sequence[float]) -> dict[str, Any]:
    """Count numbers in bins; those beyond the edges count in the outermost ones."""
    most = len(edges) - 2
    bin_of = "NULL"
    if edges:
        low, step = edges[0], (edges[-1] - edges[0]) / (len(edges) - 1)
        bin_of = (
            f"CASE WHEN isfinite(x) THEN greatest(least(floor((x - ({low!r})) / {step!r} + 1e-9), {most}), 0)::INTEGER "
            "END"
        )
    rows = view.rows(
        f"SELECT {bin_of} AS bin, count(*) AS n "
        f"FROM (\n{condition.choose(f'{quoted(column)}::DOUBLE AS x')}) AS numbers GROUP BY 1"
    )
    counts, nulls = [0] * max(len(edges) - 1, 0), 0
    for row in rows:
        if row["bin"] is None:
            nulls += int(row["n"])
        else:
            counts[row["bin"]] += int(row["n"])
    return {"kind": "bins", "edges": list(edges), "counts": counts, "nulls": nulls}


def values(view: WorkerView, column: str, condition: Condition) -> dict[str, Any]:
    """Count the commonest values of a category or a flag."""
    rows = view.rows(
        f"SELECT value, n, sum(n) OVER () AS total FROM (SELECT value, count(*) AS n FROM ("
        f"\n{condition.choose(f'{quoted(column)} AS value')}) AS chosen GROUP BY 1) AS counted "
        f"ORDER BY value IS NULL DESC, n DESC, value LIMIT {VALUES + 1}"
    )
    nulls = sum(int(row["n"]) for row in rows if row["value"] is None)
    named = [{"value": row["value"], "rows": int(row["n"])} for row in rows if row["value"] is not None][:VALUES]
    total = int(rows[0]["total"]) if rows else 0
    return {
        "kind": "values",
        "values": named,
        "others": total - nulls - sum(one["rows"] for one in named),
        "nulls": nulls,
    }
