"""Format numbers for people, and draw small inline SVG charts that follow the page's colours.

Every chart is one `<svg>` with a title and a description for those who cannot see it. Colours are the CSS custom
properties of the page (`page.html.j2`), so that a chart changes with the colour scheme.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

NBSP = "\u00a0"  # keeps a number and its unit on one line


# -- numbers -----------------------------------------------------------------------------------------------------
def format_count(value: float) -> str:
    """Group the digits: 1234567 -> "1,234,567"."""
    return f"{value:,.0f}"


def format_number(value: float) -> str:
    """Round a measured number to about three digits: 0.01234 -> "0.0123", 12.345 -> "12.3", 1234.5 -> "1,234"."""
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
    """Write bytes with decimal units, as disks and clouds count: 12345678 -> "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:,.0f}{NBSP}B" if unit == "B" else f"{value:.3g}{NBSP}{unit}"
        value /= 1000
    return f"{value:,.3g}{NBSP}PB"


def format_duration(seconds: float) -> str:
    """Write seconds in the units that people use: 0.4 -> "0.4 s", 75 -> "1 min 15 s", 7300 -> "2 h 2 min"."""
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
    """Choose round numbers within [low, high], at most about `most`."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Choose round numbers within [low, high] for a logarithmic axis: 1, 2, 5, ... or finer ones within one decade."""
    ticks = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
        if low <= m * 10.0**e <= high
    ]
    return ticks if len(ticks) >= 3 else [t for t in nice_ticks(low, high, 6) if t > 0]


# -- bars and histograms -----------------------------------------------------------------------------------------
def bar(fraction: float, ghost: float = 0.0) -> Markup:
    """Draw a horizontal bar as wide as its cell; beside a number, so it says nothing to a screen reader.

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
    """Draw vertical bars of equal width.

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
    """Draw one row of a timeline as wide as its cell: when work went on, in seconds of `total`."""
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
    """One line of the training log: images seen so far, the loss, and the name of the recipe's phase."""

    images: float
    loss: float
    phase: str


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Take the mean over `window` values around each (fewer at the ends), so that the curve does not lag behind."""
    sums = [0.0, *accumulate(values)]
    half = window // 2
    out = []
    for i in range(len(values)):
        begin, end = max(0, i - half), min(len(values), i + half + 1)
        out.append((sums[end] - sums[begin]) / (end - begin))
    return out


@dataclass(frozen=True)
class _Frame:
    """The box of a loss curve in SVG units, and the ranges of its axes; the loss is logarithmic."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    first: float
    last: float
    low: float
    high: float

    @property
    def base(self) -> float:
        """The height of the horizontal axis."""
        return self.height - self.bottom

    @property
    def end(self) -> float:
        """The right end of the horizontal axis."""
        return self.width - self.right

    def x(self, images: float) -> float:
        span = (self.last - self.first) or 1.0
        return _round(self.left + (images - self.first) / span * (self.width - self.left - self.right))

    def y(self, loss: float) -> float:
        low, high = math.log(self.low), math.log(self.high)
        share = (math.log(min(max(loss, self.low), self.high)) - low) / (high - low)
        return _round(self.height - self.bottom - share * (self.height - self.top - self.bottom))


def loss_curve(points: Sequence[Point], validation: Sequence[tuple[float, float]], wide: bool) -> Markup:
    """Draw loss by images seen, logarithmic upwards: what was logged (pale), its running mean, and the recipe's phases.

    Args:
        points: in order, with finite positive losses; at least two.
        validation: (images, loss) of samples that are held out, in order, finite and positive; may be empty.
        wide: for a desktop (720 units) or for a phone (350 units), so that the letters keep their size.
    """
    losses = [p.loss for p in points]
    means = smooth(losses, len(losses) // 40)
    frame = _frame(points, means, validation, wide)
    begins = [p for i, p in enumerate(points) if i == 0 or p.phase != points[i - 1].phase]
    stride = max(1, len(points) // 700)
    kept = sorted({*range(0, len(points), max(1, len(points) // 350)), len(points) - 1})
    parts = [
        *_axes(frame, wide),
        *_phase_marks(frame, begins),
        _line("raw", [(frame.x(p.images), frame.y(p.loss)) for p in points[::stride]]),
        _line("mean", [(frame.x(points[i].images), frame.y(means[i])) for i in kept]),
    ]
    phases = "; ".join(f"{p.phase} from {format_count(p.images)} images" for p in begins)
    description = (
        f"The running mean of the loss goes from {format_number(means[0])} to {format_number(means[-1])} "
        f"over {format_count(frame.last)} images. Stages: {phases}."
    )
    if validation:
        parts.append(_line("validation", [(frame.x(images), frame.y(loss)) for images, loss in validation]))
        first, last = validation[0][1], validation[-1][1]
        description += f" The validation loss goes from {format_number(first)} to {format_number(last)}."
    kind = f"loss {'wide' if wide else 'narrow'}"
    return _svg(frame.width, frame.height, kind, "Training loss", description, parts)


def _frame(
    points: Sequence[Point], means: Sequence[float], validation: Sequence[tuple[float, float]], wide: bool
) -> _Frame:
    """Choose ranges that hold all means and validations, and all but the outermost of what was logged."""
    ordered = sorted(p.loss for p in points)
    held_out = [loss for _, loss in validation]
    box = (720.0, 320.0, 46.0, 12.0, 30.0, 42.0) if wide else (350.0, 270.0, 40.0, 8.0, 30.0, 40.0)
    return _Frame(
        *box,
        first=min(points[0].images, *(images for images, _ in validation[:1])),
        last=max(points[-1].images, *(images for images, _ in validation[-1:])),
        low=min(ordered[int(len(ordered) * 0.002)], *means, *held_out) * 0.97,
        high=max(ordered[min(len(ordered) - 1, int(len(ordered) * 0.998))], *means, *held_out) * 1.03,
    )


def _axes(frame: _Frame, wide: bool) -> Iterator[Markup]:
    """Draw the grid, the ticks of both axes, and what the horizontal one counts."""
    for tick in log_ticks(frame.low, frame.high):
        yield Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            frame.left, frame.end, frame.y(tick), frame.y(tick)
        )
        yield Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
            frame.left - 6, frame.y(tick) + 4, format_number(tick)
        )
    for tick in nice_ticks(frame.first, frame.last, 6 if wide else 5):
        anchor = "end" if frame.x(tick) > frame.end - 14 else "middle"
        yield Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
            frame.x(tick), frame.base + 17, anchor, _short(tick)
        )
    yield Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">images seen</text>').format(
        _round((frame.left + frame.end) / 2), frame.height - 6
    )
    yield Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(frame.left, frame.end, frame.base)


def _phase_marks(frame: _Frame, begins: Sequence[Point]) -> Iterator[Markup]:
    """Draw a line where each phase of the recipe but the first begins, and its name, short where room is scarce."""
    for begin, after in zip(begins, [*begins[1:], None], strict=True):
        at, end = frame.x(begin.images), frame.x(after.images) if after else frame.end
        if begin is not begins[0]:
            yield Markup('<line class="stage" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
                at, frame.top - 16, frame.base
            )
        name = begin.phase if 7 * len(begin.phase) < end - at else begin.phase.partition(":")[0]
        yield Markup('<text class="tick" x="{}" y="{}">{}</text>').format(_round(at + 5), frame.top - 8, name)


# -- helpers -----------------------------------------------------------------------------------------------------
def _svg(width: float, height: float, kind: str, title: str, description: str, parts: Sequence[Markup]) -> Markup:
    head = Markup(
        '<svg class="chart {}" viewBox="0 0 {:g} {:g}" role="img" focusable="false"><title>{}</title><desc>{}</desc>'
    ).format(kind, width, height, title, description)
    return Markup("").join([head, *parts, Markup("</svg>")])


def _line(kind: str, points: Sequence[tuple[float, float]]) -> Markup:
    return Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(f"{x:g},{y:g}" for x, y in points))


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _percent(fraction: float) -> str:
    return f"{100 * min(max(fraction, 0.0), 1.0):.2f}"


def _round(value: float) -> float:
    return round(value, 1)
