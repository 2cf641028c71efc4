"""What the report tells of a training run: its log, its figures beside the untrained model's, and its sample grid."""

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from microdit.pipeline.report import charts
from microdit.pipeline.report.pictures import data_uri

MAX_LOG = 256 << 20  # bytes of a log that are read
MAX_GRID = 64 << 20  # bytes of a picture that is opened
GRID_SIDE = 1600  # a larger grid is scaled down to this many pixels
SHEETS, SHEET_SIDE = 3, 800  # sheets of pictures that are shown, and their most pixels


def training(run: Path) -> dict[str, Any]:
    """The run's facts. What is missing or damaged is named in `problems`, and the rest is told."""
    problems: list[str] = []
    told = _log(run / "log.jsonl", problems)
    lines = [line for line in told if "loss" in line]
    validation = _validation(told)
    names = _stage_names(run)
    points = [
        charts.Point(float(line["images"]), float(line["loss"]), _stage_name(line.get("stage"), names))
        for line in lines
        if _positive(line.get("loss")) and _positive(line.get("images"))
    ]
    if len(points) < len(lines):
        problems.append(f"{charts.format_count(len(lines) - len(points))} lines of log.jsonl have no finite loss")
    speeds = [float(line["images_per_second"]) for line in lines if _positive(line.get("images_per_second"))]
    drawn = len(points) > 1
    evaluation = _evaluation(run / "evaluation.json", problems)
    return {
        "name": run.name,
        "steps": max((int(line["step"]) for line in lines if isinstance(line.get("step"), int)), default=0),
        "images": points[-1].images if points else 0,
        "speed": statistics.median(speeds) if speeds else 0.0,
        "seconds": max((line["seconds"] for line in lines if _positive(line.get("seconds"))), default=0.0),
        "loss": statistics.fmean(p.loss for p in points[-max(1, len(points) // 40) :]) if points else None,
        "validation": validation[-1][1] if validation else None,
        "wide": charts.loss_curve(points, validation, wide=True) if drawn else None,
        "stages": list(dict.fromkeys(point.stage for point in points)),
        "narrow": charts.loss_curve(points, validation, wide=False) if drawn else None,
        "figures": _figures(evaluation),
        "grid_says": _grid_says(evaluation),
        "grid": _grid(run / "grid.png", problems),
        "sheets": _sheets(run / "samples", problems),
        "problems": problems,
    }


def _log(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        problems.append("there is no log.jsonl in the run's folder, so there is no loss curve")
        return []
    lines, torn = [], 0
    with path.open("rb") as file:
        for text in file.read(MAX_LOG).splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # a process that was killed leaves half a line
                torn += 1
                continue
            if isinstance(line, dict):
                lines.append(line)
    if torn:
        problems.append(f"{torn} lines of log.jsonl are no JSON and were left out")
    return lines


def _validation(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(images, loss) of every validation: of the averaged weights, or of the weights where there is no average."""
    found = []
    for line in lines:
        figures = line.get("validation")
        if isinstance(figures, dict) and _number(line.get("images")):
            loss: Any = figures.get("loss") if figures.get("ema_loss") is None else figures["ema_loss"]
            if _positive(loss):
                found.append((float(line["images"]), float(loss)))
    return found


def _stage_names(run: Path) -> list[str]:
    """What the recipe in the newest checkpoint says of each stage; nothing if there is none that can be read."""
    for path in sorted(run.glob("checkpoints/step-*/state.json"), reverse=True):
        try:
            stages = json.loads(path.read_text())["recipe"]["stages"]
            return [f"{s['latents'].partition('/')[2]}, mask {s['mask_ratio']:.0%}" for s in stages]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # half a checkpoint of a run that was killed
    return []


def _stage_name(number: Any, names: list[str]) -> str:
    """`stage` of a line of the log, which counts from 1, in words."""
    known = isinstance(number, int) and 0 < number <= len(names)
    return f"{number}: {names[number - 1]}" if known else f"stage {number}" if number is not None else "training"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _grid(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        problems.append("there is no grid.png in the run's folder, so there are no generated pictures here")
        return None
    return _picture(path, problems, GRID_SIDE)


def _sheets(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The last sheets that the run drew on its way, the newest first."""
    paths = [path for path in folder.glob("step-*.png") if path.stem[5:].isdecimal()]
    newest = sorted(paths, key=lambda path: int(path.stem[5:]), reverse=True)[:SHEETS]
    found = [(int(path.stem[5:]), _picture(path, problems, SHEET_SIDE)) for path in newest]
    return [picture | {"step": step} for step, picture in found if picture is not None]


def _picture(path: Path, problems: list[str], side: int) -> dict[str, Any] | None:
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
    return {"uri": data_uri(picture), "width": picture.width, "height": picture.height}


def _evaluation(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        problems.append("there is no evaluation.json in the run's folder, so there are no figures of what was learned")
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        problems.append(f"evaluation.json is no JSON: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _figures(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of (label, the trained network's figure, the untrained one's); those that were not measured are left out."""
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
        {"label": label, "trained": form.format(evaluation[name]), "untrained": form.format(before[name])}
        for name, label, form in rows
        if _number(evaluation.get(name)) and _number(before.get(name))
    ]


def _grid_says(evaluation: Mapping[str, Any]) -> str:
    drawn = f"{evaluation['count']} captions" if _number(evaluation.get("count")) else "captions"
    ways = []
    if _number(evaluation.get("num_inference_steps")):
        ways.append(f"{evaluation['num_inference_steps']} steps")
    if _number(evaluation.get("guidance_scale")):
        ways.append(f"guidance {charts.format_number(evaluation['guidance_scale'])}")
    how = f" ({', '.join(ways)})" if ways else ""
    return f"Real image, and beside it what the network made of its caption alone{how}, for {drawn} drawn at random."
