"""Training runs beside a corpus: their curves, the sheets that they drew, and samples that they found broken."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.content.png import SIGNATURE

MOST_RUNS, DEPTH = 200, 2
MAX_LOG = 256 << 20  # bytes of a log that are read: its end
MAX_STATE = 256 << 20
MAX_SHEET = 64 << 20
MOST_POINTS = 2000  # of a curve
MOST_BROKEN = 200
LOG = "log.jsonl"
LEFT_OUT = {"step", "stage", "images", "seconds", "time"}


def find_runs(folder: Path | None) -> dict[str, Path]:
    """Find the folders that a training run has written, by their path below `folder`."""
    found: dict[str, Path] = {}
    for path in _folders(folder, DEPTH) if folder is not None else ():
        if (path / LOG).is_file() and len(found) < MOST_RUNS:
            found[path.relative_to(folder).as_posix() if path != folder else path.name] = path  # type: ignore[arg-type]
    return found


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Walk a folder and those below it, but no corpus and no link."""
    yield folder
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if depth else []
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not (Path(entry.path) / "corpus.json").exists():
            yield from _folders(Path(entry.path), depth - 1)


def list_runs(folder: Path | None) -> list[dict[str, Any]]:
    """List the runs with their last step."""
    runs = []
    for name, path in find_runs(folder).items():
        steps = [line["step"] for line in _lines(path / LOG, 1 << 16) if isinstance(line.get("step"), int)]
        runs.append({"name": name, "steps": max(steps, default=0), "sheets": len(_sheets(path))})
    return runs


def describe_run(folder: Path | None, name: str) -> dict[str, Any]:
    """Read the curves of a run, list its sheets, and the samples that its newest checkpoint calls broken."""
    path = _run(folder, name)
    curves: dict[str, list[list[float]]] = {}
    for line in _lines(path / LOG, MAX_LOG):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for key, value in _numbers(line):
            curves.setdefault(key, []).append([step, value])
    return {
        "name": name,
        "curves": [{"name": key, "points": _thinned(points)} for key, points in sorted(curves.items(), key=_order)],
        "sheets": [{"step": step, "name": f"step {step:,}"} for step in sorted(_sheets(path))],
        "broken": _broken(path),
    }


def read_sheet(folder: Path | None, name: str, step: int) -> bytes:
    """Read the sheet of a step, a PNG; raises RequestError if there is none."""
    path = _sheets(_run(folder, name)).get(step)
    if path is None or path.stat().st_size > MAX_SHEET:
        raise RequestError(f"run {name[:80]!r}: it has no sheet of step {step}")
    data = path.read_bytes()
    if not data.startswith(SIGNATURE):
        raise RequestError(f"run {name[:80]!r}: {path.name} is no PNG")
    return data


def _run(folder: Path | None, name: str) -> Path:
    runs = find_runs(folder)
    if name not in runs:
        raise RequestError(f"run {name[:80]!r}: there is none; there are {', '.join(runs) or 'none'}")
    return runs[name]


def _lines(path: Path, most: int) -> Iterator[dict[str, Any]]:
    """Read the JSON objects at the end of a log; half a line is left out."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most))
        for text in file.read(most).splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line


def _numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Give the figures of a line, those of a dictionary in it with its name before theirs."""
    for key, value in line.items():
        if key in LEFT_OUT:
            continue
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number):
                yield f"{key} {name}".strip().replace("_", " "), number


def _order(curve: tuple[str, Any]) -> tuple[int, str]:
    """Put losses first."""
    return (0 if curve[0] == "loss" else 1 if "loss" in curve[0] else 2, curve[0])


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Keep at most `MOST_POINTS` points: of each stretch the last step and the mean."""
    size = -(-len(points) // MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [[part[-1][0], sum(value for _, value in part) / len(part)] for part in parts]


def _sheets(run: Path) -> dict[int, Path]:
    paths = (run / "samples").glob("step-*.png")
    return {int(path.stem[5:]): path for path in paths if path.stem[5:].isascii() and path.stem[5:].isdecimal()}


def _broken(run: Path) -> list[dict[str, Any]]:
    """Read which samples the newest checkpoint that can be read calls broken."""
    for path in sorted(run.glob("checkpoints/step-*/state.json"), reverse=True):
        try:
            if path.stat().st_size > MAX_STATE:
                continue
            listed = json.loads(path.read_bytes()).get("broken", [])
            return [
                {"column": column, "source": source, "shard": shard, "row": row, "reason": str(why)[:500]}
                for column, source, shard, row, why in listed[:MOST_BROKEN]
            ]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue  # half a checkpoint of a run that was killed
    return []
