"""Write the page of an evaluation, evaluation.html: the table with the best marked, a plot, settings and pictures."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation.metrics import METRICS
from microdit.pipeline.evaluation.picture_sets import first_pictures, open_pictures
from microdit.pipeline.evaluation.table import best_rows, higher_is_better, row_label

PICTURES, SIDE = 12, 256  # of each row that are shown, and their longest side
WIDTH, HEIGHT, EDGE = 640, 360, 56  # of the plot


@dataclass(frozen=True)
class Cell:
    """A figure of the table."""

    text: str
    best: bool


@dataclass(frozen=True)
class ShownPicture:
    """A picture of a row, as a data URI, and its caption."""

    uri: str
    caption: str


def write_page(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write evaluation.html into a folder: one file, that needs no network and no script."""
    several = len({row.get("what") for row in rows}) > 1
    labels, best = [row_label(row, several) for row in rows], best_rows(rows)
    metrics = list(rows[0]["metrics"])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template("page.html.j2").render(
        labels=labels,
        table=[
            (name, [Cell(figure_text(row["metrics"][name]), best.get(name) == i) for i, row in enumerate(rows)])
            for name in metrics
        ],
        directions={name: "higher is better" if higher_is_better(name) else "lower is better" for name in metrics},
        plots=[plot for plot in (_trade_off(rows, labels, best), _by_guidance(rows)) if plot],
        pictures=[(label, _pictures(row)) for label, row in zip(labels, rows, strict=True)],
        settings=[(label, json.dumps(_settings(row), indent=1)) for label, row in zip(labels, rows, strict=True)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.html"
    path.write_text(text, encoding="utf-8")
    return path


def figure_text(figures: Mapping[str, Any]) -> str:
    """Write a value with its standard error, and with the deviation over seeds."""
    error = "" if figures.get("error") is None else f" ± {figures['error']:.2g}"
    seeds = figures.get("seeds")
    return f"{figures['value']:.5g}{error}" + (f" (seeds ± {seeds['deviation']:.2g})" if seeds else "")


def _settings(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "metrics"}


def _pictures(row: Mapping[str, Any]) -> list[ShownPicture]:
    """Read the first pictures of a row that lie in a folder or in tars of this machine."""
    about = row.get("pictures") or {}
    about = about[0] if isinstance(about, list) else about
    try:
        some = open_pictures(Path(about["pictures"]), "pictures")
        return [_shown(each.data, each.caption) for each in first_pictures(some, PICTURES)]
    except (RequestError, KeyError, OSError, ValueError):
        return []  # of a corpus, or detections alone


def _shown(data: bytes, caption: str) -> ShownPicture:
    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return ShownPicture(f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", caption[:300])


# -- plots -----------------------------------------------------------------------------------------------------------
def _trade_off(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], best: Mapping[str, int]) -> Markup | None:
    """Plot a distance against a CLIP score, where both were measured more than once."""
    names = list(rows[0]["metrics"])
    distance = next((name for name in names if name in METRICS and name != "prdc"), None)
    score = next((name for name in names if name.startswith("clip-score")), None)
    if distance is None or score is None or len(rows) < 2:
        return None
    points = [(row["metrics"][score]["value"], row["metrics"][distance]["value"]) for row in rows]
    return _plot(f"{distance} against {score}", score, distance, points, labels, best.get(distance))


def _by_guidance(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Plot GenEval, or else the first metric, against guidance, of one model."""
    scales = [row.get("drawn", {}).get("guidance_scale") for row in rows]
    if len(rows) < 2 or None in scales or len({row["what"] for row in rows}) > 1:
        return None
    name = "geneval" if "geneval" in rows[0]["metrics"] else next(iter(rows[0]["metrics"]))
    points = [(scale, row["metrics"][name]["value"]) for scale, row in zip(scales, rows, strict=True)]
    labels = [f"{scale:g}" for scale in scales]
    return _plot(f"{name} against guidance", "guidance", name, points, labels, best_rows(rows).get(name))


def _plot(
    title: str, across: str, up: str, points: Sequence[tuple[float, float]], labels: Sequence[str], best: int | None
) -> Markup:
    """Draw points, joined in their order, as SVG; the best one is filled."""

    def scaled(values: Sequence[float], start: float, end: float) -> list[float]:
        low, high = min(values), max(values)
        return [(start + end) / 2 if high == low else start + (v - low) / (high - low) * (end - start) for v in values]

    xs = scaled([x for x, _ in points], EDGE + 20, WIDTH - 60)
    ys = scaled([y for _, y in points], HEIGHT - EDGE - 10, 30)
    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>').format(
            WIDTH, HEIGHT, title, title
        ),
        Markup('<path class="axis" d="M{0} 20V{1}H{2}"/>').format(EDGE, HEIGHT - EDGE, WIDTH - 20),
        Markup('<polyline class="line" points="{}"/>').format(
            " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        ),
    ]
    for i, (x, y, label) in enumerate(zip(xs, ys, labels, strict=True)):
        kind = "best" if i == best else "point"
        parts.append(Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(kind, x, y))
        parts.append(Markup('<text x="{:.1f}" y="{:.1f}">{}</text>').format(x + 8, y - 8, label))
    for text, x, y in ((across, WIDTH / 2, HEIGHT - 12), (up, 8, 14)):
        parts.append(Markup('<text class="name" x="{:.0f}" y="{:.0f}">{}</text>').format(x, y, text))
    for value, y in ((max(y for _, y in points), min(ys)), (min(y for _, y in points), max(ys))):
        parts.append(Markup('<text x="4" y="{:.1f}">{:.4g}</text>').format(y + 4, value))
    for value, x in ((min(x for x, _ in points), min(xs)), (max(x for x, _ in points), max(xs))):
        parts.append(Markup('<text x="{:.1f}" y="{}">{:.4g}</text>').format(x, HEIGHT - EDGE + 18, value))
    return Markup("").join([*parts, Markup("</svg>")])
