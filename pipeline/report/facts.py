"""What the report counts: the funnel, distributions, bytes and rates, from commits and the sample table."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import failures, read_failure
from microdit.pipeline.corpus.names import UNITS
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.report import charts
from microdit.pipeline.selection.selections import Selection, list_selections
from microdit.pipeline.selection.view import query
from microdit.pipeline.tables.sample_table import TableField

# Failures of `images` by the step at which an input was lost; what is not named here was lost on the way to us.
UNDECODABLE = {"not_an_image", "truncated", "damaged", "bomb", "animated"}
UNWANTED = {"too_small"}


# scores that the images' own histograms show already
SIZE_SCALARS = {"width", "height", "aspect", "short_side"}
NUMERIC = {pa.int32(), pa.float32(), pa.float64()}  # 64-bit integers are hashes and byte counts
BINS = 28

GROUPS = (
    ("Image sizes", "How large the kept images are, and how far from square."),
    ("Lengths", "Words of each caption, and tokens of those that were embedded."),
    ("Scores", "What the scorers say of each image; a selection can cut anywhere."),
    ("Latents", "The largest magnitude in each latent; a far outlier is worth a look."),
)

IDLE = 2.0  # seconds without work that still count as working: attempts are dated to the second


# -- what came in and what was dropped -----------------------------------------------------------------------------
def funnel(
    corpus: Corpus, commits: Mapping[str, Sequence[Commit]], complete: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Steps with `label`, `count`, and `drops`: (reason, count, column, key and detail of an example)."""
    lost = Counter[str]()
    for commit in commits["images"]:
        lost.update(commit.reasons)
    listed = sum(c.counts["in"] for c in commits["images"])
    examples = {
        row["reason"]: row["example"]
        for row in query(
            corpus,
            "SELECT reason, arg_min({'example': id, 'detail': detail}, id) AS example "
            "FROM samples WHERE status = 'failed' GROUP BY reason",
        ).to_pylist()
    }

    def drops(reasons: Iterable[str]) -> list[dict[str, Any]]:
        found = [{"reason": r, "count": lost[r], "column": "images"} | examples[r] for r in reasons]
        return sorted(found, key=lambda d: (-d["count"], d["reason"]))

    steps: list[dict[str, Any]] = [{"label": "Listed", "count": listed, "drops": [], "what": "inputs of the sources"}]
    for label, what, reasons in (
        ("Fetched", "bytes arrived", set(lost) - UNDECODABLE - UNWANTED),
        ("Decoded", "every pixel was read", set(lost) & UNDECODABLE),
        ("Kept", "large enough, and stored", set(lost) & UNWANTED),
    ):
        found = drops(reasons)
        count = steps[-1]["count"] - sum(d["count"] for d in found)
        steps.append({"label": label, "count": count, "drops": found, "what": what})
    condition = " AND ".join(["status = 'ok'", *complete.values()])
    whole = query(corpus, f"SELECT count(*) AS n FROM samples WHERE {condition}").column("n")[0].as_py()
    found = [drop for name in commits if name != "images" for drop in _column_drops(corpus, commits[name])]
    found.sort(key=lambda d: (-d["count"], d["column"], d["reason"]))
    steps.append(
        {"label": "In every column", "count": whole, "drops": found, "what": "captions, scores, latents, text"}
    )
    return steps


def _column_drops(corpus: Corpus, commits: Sequence[Commit]) -> list[dict[str, Any]]:
    """What failed in one column itself; what it inherited (`upstream`) is told where it began."""
    total: Counter[str] = Counter()
    where: dict[str, Commit] = {}
    for commit in commits:
        for reason, n in commit.reasons.items():
            if reason != "upstream":
                total[reason] += n
                where.setdefault(reason, commit)
    found = []
    for reason, n in total.items():
        commit = where[reason]
        row = next(r for r in corpus.sidecar(commit).to_pylist() if r["reason"] == reason)
        example = {"example": f"{commit.source}/{row['key']}", "detail": row["detail"]}
        found.append({"reason": reason, "count": n, "column": commit.column, **example})
    return found


def newest_selections(corpus: Corpus) -> list[Selection]:
    """Of every name the selection that was made last."""
    made = {item.name: item.modified for item in corpus.store.list("selections")}
    found = sorted(list_selections(corpus), key=lambda selection: made[selection.path])
    return sorted({selection.name: selection for selection in found}.values(), key=lambda selection: selection.name)


def incomplete_units(corpus: Corpus) -> list[dict[str, Any]]:
    """Sources of which units are known to be missing, by what their declarations say."""
    found = []
    for name, declaration in corpus.sources().items():
        expected, done = declaration.made_by.get("units"), len(corpus.units(name))
        if isinstance(expected, int) and done < expected:
            found.append({"source": name, "done": done, "expected": expected})
    return found


def set_aside(corpus: Corpus, columns: Iterable[str]) -> list[dict[str, Any]]:
    """Columns (and units) with shards that failed as a whole and are not committed since, with one message."""
    found = []
    for column in (*columns, UNITS):
        done = corpus.committed(column)
        left = {where: number for where, number in failures(corpus, column).items() if where not in done}
        if left:
            (source, shard), number = min(left.items())
            message = read_failure(corpus, column, source, shard, number).message
            found.append({"column": column, "count": len(left), "shard": shard, "message": message})
    return found


# -- distributions -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spread:
    """One distribution to be drawn: a SQL expression over the kept images, and how its numbers are said."""

    group: str
    title: str
    expression: str
    unit: str = ""
    words: Callable[[float], str] = charts.format_number

    @property
    def values(self) -> str:
        return f"(SELECT CAST({self.expression} AS DOUBLE) AS x FROM samples WHERE status = 'ok') WHERE isfinite(x)"

    def say(self, value: float) -> str:
        return f"{self.words(value)}{charts.NBSP}{self.unit}" if self.unit else self.words(value)


@dataclass(frozen=True)
class Bins:
    """Equal steps from `low`; numbers beyond count in the outermost ones."""

    low: float
    step: float
    count: int
    whole: bool


def histograms(corpus: Corpus, fields: Sequence[TableField]) -> list[dict[str, Any]]:
    """Groups of histograms: `title`, `sentence`, `charts`. Two queries, however many there are."""
    spreads = _spreads(fields)
    stats = query(
        corpus,
        " UNION ALL ".join(
            f"SELECT {i} AS i, count(*) AS n, min(x) AS lowest, max(x) AS highest, median(x) AS middle, "
            "quantile_cont(x, 0.005) AS low, quantile_cont(x, 0.995) AS high, bool_and(x = floor(x)) AS whole "
            f"FROM {spread.values}"
            for i, spread in enumerate(spreads)
        ),
    ).to_pylist()
    known = {row["i"]: row for row in stats if row["n"]}
    bins = {i: _bins(row, spreads[i]) for i, row in known.items() if row["lowest"] < row["highest"]}
    counts: dict[int, dict[int, int]] = defaultdict(dict)
    if bins:
        sql = " UNION ALL ".join(
            f"SELECT {i} AS i, count(*) AS n, "
            f"CAST(least(greatest(floor((x - ({b.low!r})) / {b.step!r}), 0), {b.count - 1}) AS INTEGER) AS bin "
            f"FROM {spreads[i].values} GROUP BY 3"
            for i, b in bins.items()
        )
        for row in query(corpus, sql).to_pylist():
            counts[row["i"]][row["bin"]] = row["n"]
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for i, row in sorted(known.items()):
        groups[spreads[i].group].append(_chart(spreads[i], row, bins.get(i), counts[i]))
    return [
        {"title": title, "sentence": sentence, "charts": groups[title]} for title, sentence in GROUPS if groups[title]
    ]


def _spreads(fields: Sequence[TableField]) -> list[Spread]:
    found = [
        Spread("Image sizes", "Short side", "least(width, height)", "px"),
        Spread("Image sizes", "Width to height", "log2(width / height)", words=_ratio),
    ]
    for field in fields:
        family, expression = field.column.partition("/")[0], f'"{field.name}"'
        if field.scalar is None or field.type not in NUMERIC:
            continue
        if family == "captions" and field.scalar == "tokens":
            found.append(Spread("Lengths", f"words of {field.column}", expression))
        elif family == "text":
            found.append(Spread("Lengths", f"{field.scalar} of {field.column}", expression))
        elif family == "scores" and field.scalar not in SIZE_SCALARS:
            found.append(Spread("Scores", f"{field.scalar} ({field.column})", expression))
        elif family == "latents":
            found.append(Spread("Latents", f"{field.scalar} of {field.column}", expression))
    return found


def _ratio(value: float) -> str:
    """log2 of width / height, in words."""
    text = charts.format_number(round(2 ** abs(value), 2))
    return "1:1" if text == "1" else f"{text}:1" if value > 0 else f"1:{text}"


def _bins(row: Mapping[str, Any], spread: Spread) -> Bins:
    low, high = row["low"], row["high"]
    if not high > low:  # nearly all are the same: the few others decide the range
        low, high = row["lowest"], row["highest"]
    if not row["whole"] or spread.words is _ratio:
        return Bins(low, (high - low) / BINS, BINS, whole=False)
    low, high = math.floor(low), math.ceil(high)
    step = -(-(high - low + 1) // BINS)
    return Bins(low, step, -(-(high - low + 1) // step), whole=True)


def _chart(spread: Spread, row: Mapping[str, Any], bins: Bins | None, counts: Mapping[int, int]) -> dict[str, Any]:
    facts = {"title": spread.title, "middle": spread.say(row["middle"]), "svg": None}
    if bins is None:
        return facts | {"range": f"all {charts.format_count(row['n'])} the same"}
    facts["range"] = f"{spread.words(row['lowest'])} to {spread.say(row['highest'])}"
    single = bins.whole and bins.step == 1
    drawn = []
    for i in range(bins.count):
        begin, end = bins.low + i * bins.step, bins.low + (i + 1) * bins.step
        label = spread.say(begin)
        if not single:
            label = f"{spread.words(begin)} to {spread.say(end - 1 if bins.whole else end)}"
        drawn.append(charts.Bin(label, counts.get(i, 0)))
    width = bins.step * bins.count
    places = charts.nice_ticks(bins.low, bins.low + width - (1 if bins.whole else 0))
    ticks = [
        ((place - bins.low + (0.5 if single else 0)) / width, spread.words(place))
        for place in places
        if not bins.whole or float(place).is_integer()
    ]
    description = f"Of {charts.format_count(row['n'])} images: {facts['range']}, median {facts['middle']}."
    return facts | {"svg": charts.histogram(drawn, ticks, spread.title, description)}


# -- bytes and time ------------------------------------------------------------------------------------------------
def bytes_by_column(commits: Mapping[str, Sequence[Commit]]) -> list[dict[str, Any]]:
    """Columns with `bytes` (objects and sidecars), `samples`, and bytes a sample."""
    rows = []
    for name, found in commits.items():
        total = sum(sum({o.name: o.size for o in (c.object, c.sidecar)}.values()) for c in found)
        samples = sum(c.counts["out"] for c in found)
        rows.append({"column": name, "bytes": total, "samples": samples, "each": total / samples if samples else 0})
    return rows


def rates(commits: Mapping[str, Sequence[Commit]]) -> dict[str, Any]:
    """When and how fast each column was made. Time in which no column was worked on is cut out."""
    spans = {name: _merge(_span(c) for c in found) for name, found in commits.items() if found}
    busy = _merge(span for found in spans.values() for span in found)
    total = sum(end - begin for begin, end in busy)
    rows = []
    for name, found in commits.items():
        if not found:
            continue
        samples, seconds = sum(c.counts["in"] for c in found), sum(c.timings.get("seconds", 0.0) for c in found)
        together = sum(end - begin for begin, end in spans[name])
        rows.append(
            {
                "column": name,
                "shards": len(found),
                "samples": samples,
                "failed": sum(c.counts["failed"] for c in found),
                "seconds": seconds,
                "each": samples / seconds if seconds else 0.0,
                "together": samples / together,
                "spans": _merge(
                    ((_busy_time(busy, begin), _busy_time(busy, end)) for begin, end in spans[name]), total / 400
                ),
            }
        )
    begin, end = busy[0][0], busy[-1][1]
    samples = sum(c.counts["in"] for c in commits["images"])
    dates = [datetime.fromtimestamp(at, UTC).strftime("%-d %B %Y") for at in (begin, end)]
    return {
        "rows": rows,
        "seconds": total,
        "rate": samples / total,
        "hosts": len({c.host for found in commits.values() for c in found}),
        "dates": dates[0] if dates[0] == dates[1] else f"{dates[0]} to {dates[1]}",
    }


def _span(commit: Commit) -> tuple[float, float]:
    begin = datetime.strptime(commit.attempt[:15], "%Y%m%dT%H%M%S").replace(tzinfo=UTC).timestamp()
    return begin, begin + max(commit.timings.get("seconds", 0.0), 0.001)


def _merge(spans: Iterable[tuple[float, float]], idle: float = IDLE) -> list[tuple[float, float]]:
    """Spans in order, joined where at most `idle` seconds lie between them."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1] + idle:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _busy_time(busy: Sequence[tuple[float, float]], at: float) -> float:
    """How much of the busy time lies before a moment."""
    return sum(min(end, at) - begin for begin, end in busy if begin < at)


# -- the sample table ----------------------------------------------------------------------------------------------
def complete_samples(fields: Sequence[TableField], columns: Iterable[str]) -> dict[str, str]:
    """By column, SQL that is true of the samples that have it."""
    found = {}
    for column in columns:
        mine = [field for field in fields if field.column == column]
        there = next((field.name for field in mine if field.scalar is None), None)
        if there is not None:
            found[column] = f'"{there}"'
        elif mine:  # of a table: every scalar is null where the sample failed
            found[column] = f'"{mine[0].name}" IS NOT NULL'
    return found
