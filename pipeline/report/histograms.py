"""Draw the distributions of the kept images: sizes, lengths, scores, latents."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from markupsafe import Markup

from microdit.pipeline.report import charts
from microdit.pipeline.report.sample_view import SampleView
from microdit.pipeline.tables.sample_table import TableField

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


@dataclass(frozen=True)
class Spread:
    """One distribution to be drawn: a SQL expression over the kept images, and how to write its numbers."""

    group: str
    title: str
    expression: str
    unit: str = ""
    words: Callable[[float], str] = charts.format_number

    @property
    def values(self) -> str:
        """SQL to select the finite values from, as `x`."""
        return f"(SELECT CAST({self.expression} AS DOUBLE) AS x FROM samples WHERE status = 'ok') WHERE isfinite(x)"

    def with_unit(self, value: float) -> str:
        return f"{self.words(value)}{charts.NBSP}{self.unit}" if self.unit else self.words(value)


@dataclass(frozen=True)
class Bins:
    """Bins of equal width `step` from `low`; values beyond them count in the outermost ones."""

    low: float
    step: float
    count: int
    whole: bool


@dataclass(frozen=True)
class SpreadStats:
    """Statistics of one value over the kept images: count, range, quantiles, and if all are whole numbers."""

    i: int
    n: int
    lowest: float
    highest: float
    middle: float
    low: float
    high: float
    whole: bool


@dataclass(frozen=True)
class Histogram:
    """One chart: title, range and median in words; no picture where all values are the same."""

    title: str
    range: str
    middle: str
    svg: Markup | None


@dataclass(frozen=True)
class HistogramGroup:
    """Charts under one heading, with a sentence of what they show."""

    title: str
    sentence: str
    charts: list[Histogram]


def histograms(view: SampleView, fields: Sequence[TableField]) -> list[HistogramGroup]:
    """Draw how sizes, lengths, scores and latents spread. Two queries, however many there are."""
    spreads = _spreads(fields)
    stats = _stats(view, spreads)
    bins = {i: _bins(one, spreads[i]) for i, one in stats.items() if one.lowest < one.highest}
    counts = _counts(view, spreads, bins)
    groups: dict[str, list[Histogram]] = defaultdict(list)
    for i, one in sorted(stats.items()):
        chart = _chart(spreads[i], one, bins[i], counts[i]) if i in bins else _single(spreads[i], one)
        groups[spreads[i].group].append(chart)
    return [HistogramGroup(title, sentence, groups[title]) for title, sentence in GROUPS if groups[title]]


def _stats(view: SampleView, spreads: Sequence[Spread]) -> dict[int, SpreadStats]:
    """Ask for the statistics of all spreads, by their number; those without a value are left out."""
    rows = view.rows(
        " UNION ALL ".join(
            f"SELECT {i} AS i, count(*) AS n, min(x) AS lowest, max(x) AS highest, median(x) AS middle, "
            "quantile_cont(x, 0.005) AS low, quantile_cont(x, 0.995) AS high, bool_and(x = floor(x)) AS whole "
            f"FROM {spread.values}"
            for i, spread in enumerate(spreads)
        )
    )
    return {row["i"]: SpreadStats(**row) for row in rows if row["n"]}


def _counts(view: SampleView, spreads: Sequence[Spread], bins: Mapping[int, Bins]) -> dict[int, dict[int, int]]:
    """Count the images in every bin, by number of the spread and of the bin; empty bins are left out."""
    counts: dict[int, dict[int, int]] = defaultdict(dict)
    if not bins:
        return counts
    sql = " UNION ALL ".join(
        f"SELECT {i} AS i, count(*) AS n, "
        f"CAST(least(greatest(floor((x - ({b.low!r})) / {b.step!r}), 0), {b.count - 1}) AS INTEGER) AS bin "
        f"FROM {spreads[i].values} GROUP BY 3"
        for i, b in bins.items()
    )
    for row in view.rows(sql):
        counts[row["i"]][row["bin"]] = row["n"]
    return counts


def _spreads(fields: Sequence[TableField]) -> list[Spread]:
    """Choose what to draw: image sizes, and the numeric scalars of every column."""
    spreads = [
        Spread("Image sizes", "Short side", "least(width, height)", "px"),
        Spread("Image sizes", "Width to height", "log2(width / height)", words=_ratio),
    ]
    for field in fields:
        family, expression = field.column.partition("/")[0], f'"{field.name}"'
        if field.scalar is None or field.type not in NUMERIC:
            continue
        if family == "captions" and field.scalar == "tokens":
            spreads.append(Spread("Lengths", f"words of {field.column}", expression))
        elif family == "text":
            spreads.append(Spread("Lengths", f"{field.scalar} of {field.column}", expression))
        elif family == "scores" and field.scalar not in SIZE_SCALARS:
            spreads.append(Spread("Scores", f"{field.scalar} ({field.column})", expression))
        elif family == "latents":
            spreads.append(Spread("Latents", f"{field.scalar} of {field.column}", expression))
    return spreads


def _ratio(value: float) -> str:
    """Write log2 of width / height as a ratio, e.g. `1.5:1`."""
    text = charts.format_number(round(2 ** abs(value), 2))
    return "1:1" if text == "1" else f"{text}:1" if value > 0 else f"1:{text}"


def _bins(stats: SpreadStats, spread: Spread) -> Bins:
    """Choose about `BINS` bins of equal width between the outer quantiles, of whole numbers where all values are."""
    low, high = stats.low, stats.high
    if not high > low:  # nearly all are the same: the few others decide the range
        low, high = stats.lowest, stats.highest
    if not stats.whole or spread.words is _ratio:
        return Bins(low, (high - low) / BINS, BINS, whole=False)
    low, high = math.floor(low), math.ceil(high)
    step = -(-(high - low + 1) // BINS)
    return Bins(low, step, -(-(high - low + 1) // step), whole=True)


def _single(spread: Spread, stats: SpreadStats) -> Histogram:
    """Say that all values are the same."""
    return Histogram(
        spread.title, f"all {charts.format_count(stats.n)} the same", spread.with_unit(stats.middle), svg=None
    )


def _chart(spread: Spread, stats: SpreadStats, bins: Bins, counts: Mapping[int, int]) -> Histogram:
    """Draw the counts of a spread's bins."""
    middle = spread.with_unit(stats.middle)
    whole_range = f"{spread.words(stats.lowest)} to {spread.with_unit(stats.highest)}"
    single = bins.whole and bins.step == 1
    drawn = []
    for i in range(bins.count):
        begin, end = bins.low + i * bins.step, bins.low + (i + 1) * bins.step
        label = spread.with_unit(begin)
        if not single:
            label = f"{spread.words(begin)} to {spread.with_unit(end - 1 if bins.whole else end)}"
        drawn.append(charts.Bin(label, counts.get(i, 0)))
    width = bins.step * bins.count
    ticks = [
        ((tick - bins.low + (0.5 if single else 0)) / width, spread.words(tick))
        for tick in charts.nice_ticks(bins.low, bins.low + width - (1 if bins.whole else 0))
        if not bins.whole or float(tick).is_integer()
    ]
    description = f"Of {charts.format_count(stats.n)} images: {whole_range}, median {middle}."
    return Histogram(spread.title, whole_range, middle, charts.histogram(drawn, ticks, spread.title, description))
