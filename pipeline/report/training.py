"""Read a training run: its log, its figures beside the untrained model's, and the pictures that it drew."""

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from microdit.pipeline.report import charts
from microdit.pipeline.report.pictures import data_uri

MAX_LOG = 256 << 20  # bytes of a log that are read
MAX_GRID = 64 << 20  # bytes of a picture that is opened
GRID_SIDE = 1600  # a larger grid is scaled down to this many pixels
METRIC_LABELS = {"kid-lite": "KID of EfficientNet-Lite0 to real images (0 is best)"}
SHEETS, SHEET_SIDE = 3, 800  # sheets of pictures that are shown, and their most pixels


@dataclass(frozen=True)
class Figure:
    """Measurement of the trained network, and the same of the untrained one, in words."""

    label: str
    trained: str
    untrained: str


@dataclass(frozen=True)
class RunPicture:
    """A picture that the run drew; of a sheet drawn on the way, after which step."""

    uri: str
    width: int
    height: int
    step: int | None = None


@dataclass(frozen=True)
class Training:
    """Contents of a run's folder."""

    steps: int
    images: float
    """Seen in all."""
    speed: float
    """Images a second, the median; 0 if it was not logged."""
    seconds: float
    loss: float | None
    """The mean of the last fortieth of the log."""
    validation: float | None
    """The last validation loss."""
    wide: Markup | None
    """The loss curve for a desktop."""
    narrow: Markup | None
    """The loss curve for a phone."""
    phases: list[str]
    """Names of the recipe's phases, in order."""
    figures: list[Figure]
    grid: RunPicture | None
    grid_caption: str
    sheets: list[RunPicture]
    problems: list[str]
    """Files that are missing or damaged."""


def training(run: Path) -> Training:
    """Read a run's folder. What is missing or damaged is named in `problems`, and the rest is shown."""
    problems: list[str] = []
    log = _log(run / "log.jsonl", problems)
    lines = [line for line in log if "loss" in line]
    points = _points(lines, _phase_names(run), problems)
    validation = _validation(log)
    speeds = [float(line["images_per_second"]) for line in lines if _positive(line.get("images_per_second"))]
    drawn = len(points) > 1
    evaluation = _evaluation(run / "evaluation.json", problems)
    return Training(
        steps=max((int(line["step"]) for line in lines if isinstance(line.get("step"), int)), default=0),
        images=points[-1].images if points else 0,
        speed=statistics.median(speeds) if speeds else 0.0,
        seconds=max((line["seconds"] for line in lines if _positive(line.get("seconds"))), default=0.0),
        loss=statistics.fmean(p.loss for p in points[-max(1, len(points) // 40) :]) if points else None,
        validation=validation[-1][1] if validation else None,
        wide=charts.loss_curve(points, validation, wide=True) if drawn else None,
        narrow=charts.loss_curve(points, validation, wide=False) if drawn else None,
        phases=list(dict.fromkeys(point.phase for point in points)),
        figures=_figures(evaluation),
        grid=_grid(run / "grid.png", problems),
        grid_caption=_grid_caption(evaluation),
        sheets=_sheets(run / "samples", problems),
        problems=problems,
    )


def _log(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Read the lines of a log that are JSON objects."""
    if not path.is_file():
        problems.append("there is no log.jsonl in the run's folder, so there is no loss curve")
        return []
    lines, torn = [], 0
    with path.open("rb") as file:
        for text in file.read(MAX_LOG).splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):  # a process that was killed leaves half a line
                torn += 1
                continue
            if isinstance(line, dict):
                lines.append(line)
    if torn:
        problems.append(f"{torn} lines of log.jsonl are no JSON and were left out")
    return lines


def _points(lines: Sequence[Mapping[str, Any]], names: Sequence[str], problems: list[str]) -> list[charts.Point]:
    """Take the points of the loss curve from the log, without those whose loss is not finite."""
    points = [
        charts.Point(float(line["images"]), float(line["loss"]), _phase_name(line.get("stage"), names))
        for line in lines
        if _positive(line.get("loss")) and _positive(line.get("images"))
    ]
    if len(points) < len(lines):
        problems.append(f"{charts.format_count(len(lines) - len(points))} lines of log.jsonl have no finite loss")
    return points


def _validation(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Take (images, loss) of every validation: of the averaged weights, or of the weights if there is no average."""
    losses = []
    for line in lines:
        figures = line.get("validation")
        if isinstance(figures, dict) and _number(line.get("images")):
            loss: Any = figures.get("loss") if figures.get("ema_loss") is None else figures["ema_loss"]
            if _positive(loss):
                losses.append((float(line["images"]), float(loss)))
    return losses


def _phase_names(run: Path) -> list[str]:
    """Name the recipe's phases by the newest checkpoint that can be read; empty if there is none."""
    for path in sorted(run.glob("checkpoints/step-*/state.json"), reverse=True):
        try:
            phases = json.loads(path.read_text())["recipe"]["stages"]
            return [f"{phase['latents'].partition('/')[2]}, mask {phase['mask_ratio']:.0%}" for phase in phases]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # half a checkpoint of a run that was killed
    return []


def _phase_name(number: Any, names: Sequence[str]) -> str:
    """Name the phase of a line of the log, which counts from 1."""
    known = isinstance(number, int) and 0 < number <= len(names)
    return f"{number}: {names[number - 1]}" if known else f"stage {number}" if number is not None else "training"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _grid(path: Path, problems: list[str]) -> RunPicture | None:
    if not path.is_file():
        problems.append("there is no grid.png in the run's folder, so there are no generated pictures here")
        return None
    return _picture(path, problems, GRID_SIDE)


def _sheets(folder: Path, problems: list[str]) -> list[RunPicture]:
    """Read the last sheets that the run drew on its way, the newest first."""
    paths = [path for path in folder.glob("step-*.png") if path.stem[5:].isdecimal()]
    newest = sorted(paths, key=lambda path: int(path.stem[5:]), reverse=True)[:SHEETS]
    pictures = [(int(path.stem[5:]), _picture(path, problems, SHEET_SIDE)) for path in newest]
    return [replace(picture, step=step) for step, picture in pictures if picture is not None]


def _picture(path: Path, problems: list[str], side: int) -> RunPicture | None:
    """Read a picture, scaled down to at most `side` pixels; None, with a problem more, if it cannot be read."""
    if path.stat().st_size > MAX_GRID:
        problems.append(f"{path.name} is larger than {charts.format_bytes(MAX_GRID)} and was left out")
        return None
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return None
    picture.thumbnail((side, side))
    return RunPicture(data_uri(picture), picture.width, picture.height)


def _evaluation(path: Path, problems: list[str]) -> dict[str, Any]:
    """Read the figures that the run's evaluation wrote; empty, with a problem more, if there are none."""
    if not path.is_file():
        problems.append("there is no evaluation.json in the run's folder, so there are no figures of what was learned")
        return {}
    try:
        evaluation = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        problems.append(f"evaluation.json is no JSON: {error}")
        return {}
    return evaluation if isinstance(evaluation, dict) else {}


def _figures(evaluation: Mapping[str, Any]) -> list[Figure]:
    """Put the trained network's figures beside the untrained one's; those that were not measured are left out."""
    before = evaluation.get("untrained")
    before = before if isinstance(before, dict) else {}
    count, held_out = evaluation.get("count", 0), evaluation.get("held_out_count", 0)
    nearest = "Nearest to their own real image, among "
    rows = (
        ("nearest_in_count", f"{nearest}those of the {count} captions drawn", "{} of " + str(count)),
        (
            "nearest_in_all",
            f"{nearest}all {charts.format_count(evaluation.get('images', 0))} real images",
            "{} of " + str(count),
        ),
        (
            "held_out_nearest_in_count",
            f"{nearest}those of {held_out} captions held out of training",
            "{} of " + str(held_out),
        ),
        ("psnr", "PSNR to their own real image, mean", "{:.1f} dB"),
        ("held_out_psnr", "The same, of captions held out of training", "{:.1f} dB"),
    )
    return [
        Figure(label, form.format(evaluation[name]), form.format(before[name]))
        for name, label, form in rows
        if _number(evaluation.get(name)) and _number(before.get(name))
    ] + _metrics(evaluation, before)


def _metrics(evaluation: Mapping[str, Any], before: Mapping[str, Any]) -> list[Figure]:
    """Take the figures of `microdit evaluate`'s metrics, each with its standard error."""
    figures = []
    both = [each.get("metrics") for each in (evaluation, before)]
    trained, untrained = (each if isinstance(each, dict) else {} for each in both)
    for name, found in trained.items():
        pair = [each for each in (found, untrained.get(name)) if isinstance(each, dict) and _number(each.get("value"))]
        if len(pair) == 2:
            texts = [_with_error(each["value"], each.get("error")) for each in pair]
            figures.append(Figure(METRIC_LABELS.get(str(name), str(name)), texts[0], texts[1]))
    return figures


def _with_error(value: float, error: Any) -> str:
    return f"{value:.3g} ± {error:.1g}" if _number(error) else f"{value:.3g}"


def _grid_caption(evaluation: Mapping[str, Any]) -> str:
    """Say how the pictures of the grid were made."""
    drawn = f"{evaluation['count']} captions" if _number(evaluation.get("count")) else "captions"
    ways = []
    if _number(evaluation.get("num_inference_steps")):
        ways.append(f"{evaluation['num_inference_steps']} steps")
    if _number(evaluation.get("guidance_scale")):
        ways.append(f"guidance {charts.format_number(evaluation['guidance_scale'])}")
    how = f" ({', '.join(ways)})" if ways else ""
    return f"Real image, and beside it what the network made of its caption alone{how}, for {drawn} drawn at random."
