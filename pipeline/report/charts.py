"""What the report draws: numbers written for people, and small inline SVG charts that follow the page's colours.

Every chart is one `<svg>` with a title and a description for those who cannot see it. Colours are the CSS custom
properties of the page (`page.html.j2`), so that a chart changes with the colour scheme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

NBSP = "\u00a0"  # keeps a number and its unit on one line


# -- numbers -----------------------------------------------------------------------------------------------------
def format_count(value: float) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,.0f}"


def format_number(value: float) -> str:
    """A measured number with about three digits: 0.01234 -> "0.0123", 12.345 -> "12.3", 1234.5 -> "1,234"."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.1e}"
    if float(value).is_integer() or magnitude >= 3:
        return f"{value:,.0f}"
    text = f"{value:,.{max(0, 2 - magnitude)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_bytes(value: float) -> str:
    """Decimal units, as disks and clouds count: 12345678 -> "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:,.0f}{NBSP}B" if unit == "B" else f"{value:.3g}{NBSP}{unit}"
        value /= 1000
    return f"{value:,.3g}{NBSP}PB"


def format_duration(seconds: float) -> str:
    """0.4 -> "0.4 s", 75 -> "1 min 15 s", 7300 -> "2 h 2 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f}{NBSP}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60}{NBSP}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}{NBSP}h {minutes}{NBSP}min" if hours < 48 else f"{hours / 24:.1f}{NBSP}days"


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most about `most`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high] for a logarithmic axis: 1, 2, 5, ... or finer ones within one decade."""
    ticks = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
        if low <= m * 10.0**e <= high
    ]
    return ticks if len(ticks) >= 3 else [t for t in nice_ticks(low, high, 6) if t > 0]


# -- bars and histograms -----------------------------------------------------------------------------------------
def bar(fraction: float, ghost: float = 0.0) -> Markup:
    """A horizontal bar as wide as its place; beside a number, so it says nothing to a screen reader.

    Args:
        fraction: filled share, 0 to 1.
        ghost: share that a paler bar behind it fills (what there was before).
    """
    parts = [Markup('<svg class="bar" aria-hidden="true" focusable="false">')]
    if ghost > fraction:
        parts.append(Markup('<rect class="ghost" width="{}%" height="100%" rx="2"/>').format(_percent(ghost)))
    if fraction > 0:
        width = max(fraction, 0.002)  # a hair is more honest than nothing
        parts.append(Markup('<rect class="fill" width="{}%" height="100%" rx="2"/>').format(_percent(width)))
    return Markup("").join([*parts, Markup("</svg>")])


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram: what it stands for in words, and how many there are."""

    label: str
    count: int


def histogram(
    bins: Sequence[Bin], ticks: Sequence[tuple[float, str]], title: str, description: str, what: str = "images"
) -> Markup:
    """Vertical bars of equal width.

    Args:
        bins: from left to right.
        ticks: labels below the axis; positions from 0 (left end) to 1 (right end).
        what: the thing counted, for the text that stands over a bar.
    """
    width, height, left, right, top, bottom = 320.0, 150.0, 4.0, 4.0, 18.0, 22.0
    inner, base = width - left - right, height - bottom
    most = max((b.count for b in bins), default=0) or 1
    step = inner / max(1, len(bins))
    gap = min(2.0, step * 0.2)
    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, width - right, top, top),
        Markup('<text class="tick" x="{}" y="{}">{}</text>').format(left, top - 5, f"{format_count(most)} {what}"),
    ]
    for i, b in enumerate(bins):
        if b.count:
            tall = max(1.0, b.count / most * (base - top))
            parts.append(
                Markup('<rect class="fill" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                    _round(left + i * step + gap / 2),
                    _round(base - tall),
                    _round(step - gap),
                    _round(tall),
                    f"{b.label}: {format_count(b.count)} {what}",
                )
            )
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, width - right, base, base))
    for position, label in ticks:
        x = left + position * inner
        anchor = "start" if position < 0.06 else "end" if position > 0.94 else "middle"
        parts.append(
            Markup('<line class="axis" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(_round(x), base, base + 4)
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                _round(x), height - 5, anchor, label
            )
        )
    return _svg(width, height, "histogram", title, description, parts)


def timeline(spans: Sequence[tuple[float, float]], total: float) -> Markup:
    """One row of a timeline: when work went on, in seconds of `total`; as wide as its place."""
    parts = [Markup('<svg class="bar timeline" aria-hidden="true" focusable="false">')]
    for begin, end in spans:
        parts.append(
            Markup('<rect class="fill" x="{}%" width="{}%" height="100%"/>').format(
                _percent(begin / total), _percent(max((end - begin) / total, 0.003))
            )
        )
    return Markup("").join([*parts, Markup("</svg>")])


# -- the loss curve ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Point:
    """One line of the training log: images seen so far, the loss, and the recipe's stage."""

    images: float
    loss: float
    stage: str


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean over `window` values around each (fewer at the ends), so that the curve does not lag behind."""
    sums = [0.0, *accumulate(values)]
    half = window // 2
    out = []
    for i in range(len(values)):
        begin, end = max(0, i - half), min(len(values), i + half + 1)
        out.append((sums[end] - sums[begin]) / (end - begin))
    return out


def loss_curve(points: Sequence[Point], validation: Sequence[tuple[float, float]], wide: bool) -> Markup:
    """Loss by images seen, logarithmic upwards: what was logged (pale), its running mean, and the recipe's stages.

    Args:
        points: in order, with finite positive losses; at least two.
        validation: (images, loss) of samples that are held out, in order, finite and positive; may be empty.
        wide: for a desktop (720 units) or for a phone (350 units), so that the letters keep their size.
    """
    width, height, left, right, top, bottom = (720.0, 320.0, 46.0, 12.0, 30.0, 42.0) if wide else (
        350.0, 270.0, 40.0, 8.0, 30.0, 40.0,
    )  # fmt: skip
    losses = [p.loss for p in points]
    means = smooth(losses, len(losses) // 40)
    ordered = sorted(losses)
    shown = [loss for _, loss in validation]
    low = min(ordered[int(len(ordered) * 0.002)], *means, *shown) * 0.97
    high = max(ordered[min(len(ordered) - 1, int(len(ordered) * 0.998))], *means, *shown) * 1.03
    first = min(points[0].images, *(images for images, _ in validation[:1]))
    last = max(points[-1].images, *(images for images, _ in validation[-1:]))
    span = (last - first) or 1.0

    def x(images: float) -> float:
        return _round(left + (images - first) / span * (width - left - right))

    def y(loss: float) -> float:
        share = (math.log(min(max(loss, low), high)) - math.log(low)) / (math.log(high) - math.log(low))
        return _round(height - bottom - share * (height - top - bottom))

    parts: list[Markup] = []
    for tick in log_ticks(low, high):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, width - right, y(tick), y(tick))
        )
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
                left - 6, y(tick) + 4, format_number(tick)
            )
        )
    for tick in nice_ticks(first, last, 6 if wide else 5):
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
                x(tick), height - bottom + 17, "end" if x(tick) > width - right - 14 else "middle", _short(tick)
            )
        )
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">images seen</text>').format(
            _round((left + width - right) / 2), height - 6
        )
    )
    parts.append(Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(
        left, width - right, height - bottom
    ))  # fmt: skip
    begins = [p for i, p in enumerate(points) if i == 0 or p.stage != points[i - 1].stage]
    for begin, after in zip(begins, [*begins[1:], None], strict=True):
        at, end = x(begin.images), x(after.images) if after else width - right
        if begin is not begins[0]:
            parts.append(
                Markup('<line class="stage" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                    at, top - 16, height - bottom
                )
            )
        name = begin.stage if 7 * len(begin.stage) < end - at else begin.stage.partition(":")[0]
        parts.append(Markup('<text class="tick" x="{}" y="{}">{}</text>').format(_round(at + 5), top - 8, name))
    stride = max(1, len(points) // 700)
    parts.append(_line("raw", [(x(p.images), y(p.loss)) for p in points[::stride]]))
    kept = sorted({*range(0, len(points), max(1, len(points) // 350)), len(points) - 1})
    parts.append(_line("mean", [(x(points[i].images), y(means[i])) for i in kept]))
    if shown:
        parts.append(_line("validation", [(x(images), y(loss)) for images, loss in validation]))
    stages = "; ".join(f"{p.stage} from {format_count(p.images)} images" for p in begins)
    description = (
        f"The running mean of the loss goes from {format_number(means[0])} to {format_number(means[-1])} "
        f"over {format_count(last)} images. Stages: {stages}."
    )
    if shown:
        description += f" The validation loss goes from {format_number(shown[0])} to {format_number(shown[-1])}."
    return _svg(width, height, f"loss {'wide' if wide else 'narrow'}", "Training loss", description, parts)


# -- helpers -----------------------------------------------------------------------------------------------------
def _svg(width: float, height: float, kind: str, title: str, description: str, parts: Sequence[Markup]) -> Markup:
    head = Markup(
        '<svg class="chart {}" viewBox="0 0 {:g} {:g}" role="img" focusable="false"><title>{}</title><desc>{}</desc>'
    ).format(kind, width, height, title, description)
    return Markup("").join([head, *parts, Markup("</svg>")])


def _line(kind: str, places: Sequence[tuple[float, float]]) -> Markup:
    return Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(f"{x:g},{y:g}" for x, y in places))


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _percent(fraction: float) -> str:
    return f"{100 * min(max(fraction, 0.0), 1.0):.2f}"


def _round(value: float) -> float:
    return round(value, 1)
