"""How a column is spread among chosen samples: bins of numbers, or the commonest values; called in workers."""

import math
from collections.abc import Sequence
from typing import Any

from microdit.pipeline.explore.condition import Condition
from microdit.pipeline.explore.rows import quoted
from microdit.pipeline.explore.worker import WorkerView

VALUES = 50  # of a category that are named; the others are counted together
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


def numbers(view: WorkerView, column: str, condition: Condition, most: int) -> dict[str, Any]:
    """Count numbers in about so many bins, which are the same whatever the condition."""
    found = view.quantiles([column], quantiles)[column]
    if not found:
        (row,) = view.rows(f"SELECT count(*) AS n FROM (\n{condition.choose('source')}) AS chosen")
        return {"kind": "bins", "edges": [], "counts": [], "nulls": int(row["n"])}
    return bins(view, column, condition, edges_of(found, most, all(value == int(value) for value in found)))


def edges_of(values: Sequence[float], bins: int, whole: bool) -> list[float]:
    """Choose the edges of bins of equal width between the outer quantiles; the outermost bins hold what is beyond."""
    if not values:
        return []
    low, high = values[1], values[-2]
    if not high > low:
        low, high = values[0], values[-1]
    if not high > low:
        return [low, low + 1.0] if whole else [low, math.nextafter(low, math.inf)]
    if whole:
        low, high = math.floor(low), math.ceil(high) + 1
        step = float(-(-(high - low) // bins))
        return [low + step * n for n in range(math.ceil((high - low) / step) + 1)]
    return [low + (high - low) * n / bins for n in range(bins + 1)]


def bins(view: WorkerView, column: str, condition: Condition, edges: Sequence[float]) -> dict[str, Any]:
    """Count numbers in bins; those beyond the edges count in the outermost ones, and move these edges to them."""
    value, most = f"{quoted(column)}::DOUBLE", len(edges) - 2
    low, step = edges[0], edges[1] - edges[0]
    number = f"greatest(least(floor((x - ({low!r})) / {step!r}), {most}), 0)::INTEGER"
    rows = view.rows(
        f"SELECT CASE WHEN isfinite(x) THEN {number} END AS bin, count(*) AS n, "
        f"min(x) FILTER (isfinite(x)) AS low, max(x) FILTER (isfinite(x)) AS high "
        f"FROM (\n{condition.choose(f'{value} AS x')}) AS numbers GROUP BY 1"
    )
    counts = [0] * (len(edges) - 1)
    nulls, ends = 0, list(map(float, edges))
    for row in rows:
        if row["bin"] is None:
            nulls += int(row["n"])
        else:
            counts[row["bin"]] += int(row["n"])
            ends[0], ends[-1] = min(ends[0], row["low"]), max(ends[-1], row["high"])
    return {"kind": "bins", "edges": ends, "counts": counts, "nulls": nulls}


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
