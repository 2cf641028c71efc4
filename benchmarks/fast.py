"""Measures what a switch of a recipe gives for the same images, or the same minutes, on the demo's corpus.

    python -m benchmarks.fast --switches off,muon [--seeds 0,1,2] [--images N | --minutes M] [--corpus DIR] [--json]
                              [key=value ...]

Every switch is trained with every seed: configs/recipes/demo.yaml, one process, as many threads as OMP_NUM_THREADS
says. `off` is the recipe as it is, and always measured. key=value changes the recipe of all. Without --corpus the
corpus is built first. A line is printed after each run, so that a night that is cut short leaves what it did.

images       seen
validation   loss of the moving average over what was held out (comparable: no switch changes the loss)
nearest      of 64 drawn pictures, those nearest to their own image among the 64
nearest_all  the same among all images
psnr         mean over the pictures, each against its own image, dB
mean, error  of each figure over the seeds, and the standard error of the mean
moved        by how many standard errors of the difference a switch moves a figure from `off`: 2 and more counts
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.regression import build_columns
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli.demo import COLUMNS
from microdit.pipeline.cli.demo_evaluation import evaluate
from microdit.pipeline.cli.demo_plan import RECIPE
from microdit.trainer.recipe import load_recipe
from microdit.trainer.train import train

SWITCHES: dict[str, list[str]] = {"off": [], "muon": ["optimizer.name=muon"]}
FIGURES = ("validation", "nearest", "nearest_all", "psnr")
STEPS = 4  # of sampling


def main() -> int:
    parser = argparse.ArgumentParser(description="What each switch of a recipe gives, with its error over seeds.")
    parser.add_argument("--switches", default=",".join(SWITCHES), help=f"of {', '.join(SWITCHES)}")
    parser.add_argument("--seeds", default="0,1,2")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, default=48_000, help="that each run sees")
    length.add_argument("--minutes", type=float, help="that each run trains, in place of a number of images")
    parser.add_argument("--corpus", help="a corpus of configs/demo.yaml; without it, one is built")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the recipe")
    given = parser.parse_args()
    names = list(dict.fromkeys(["off", *given.switches.split(",")]))
    if unknown := sorted(set(names) - set(SWITCHES)):
        parser.error(f"--switches: {', '.join(unknown)}; expected some of {', '.join(SWITCHES)}")
    lengths = [f"time_budget={60 * given.minutes}"] if given.minutes else shortened(given.images)
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        try:
            corpus = given.corpus or build_columns(Path(scratch) / "corpus", COLUMNS)
            rows = []
            for seed in map(int, given.seeds.split(",")):  # seed by seed, so that a part of a night is worth something
                for name in names:
                    out = Path(scratch) / f"{name}-{seed}"
                    changes = [f"corpus={corpus}", f"out={out}", f"seed={seed}", "selection=null", *lengths]
                    rows.append({"switch": name, "seed": seed} | measure([*changes, *given.overrides, *SWITCHES[name]]))
                    print(json.dumps(rows[-1]), flush=True)
        except RequestError as error:
            print(error, file=sys.stderr)
            return 2
    switches = summarize(rows)
    if given.json:
        print(json.dumps({"rows": rows, "switches": switches}))
    else:
        for name, figures in switches.items():
            print(name, json.dumps(figures))
    return 0


def shortened(images: int) -> list[str]:
    """Change the recipe to see so many images, with all lengths in it in their proportion."""
    recipe = load_recipe(RECIPE)
    share = images / sum(leg.images or 0 for leg in recipe.stages)
    changes = []
    for number, leg in enumerate(recipe.stages):
        changes.append(f"stages.{number}.images={max(round(share * (leg.images or 0)), 1)}")
        changes.append(f"stages.{number}.warmup={round(share * leg.warmup)}")
        changes.append(f"stages.{number}.ema_half_life={share * leg.half_lives[0]}")
    return changes


def measure(changes: Sequence[str]) -> dict[str, Any]:
    """Train and draw; return the figures."""
    recipe = load_recipe(RECIPE, changes)
    summary = train(recipe)
    if summary["signal"]:
        raise KeyboardInterrupt
    drawn = evaluate(recipe.out, num_inference_steps=STEPS)
    return {
        "images": summary["images"],
        "seconds": round(summary["seconds"], 1),
        "validation": summary["validation"],
        "nearest": drawn["nearest_in_count"],
        "nearest_all": drawn["nearest_in_all"],
        "psnr": drawn["psnr"],
    }


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Compute mean and error of each switch's figures, and by how many errors it moves them from `off`."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in dict.fromkeys(row["switch"] for row in rows):
        found[name] = {}
        for figure in FIGURES:
            values = [row[figure] for row in rows if row["switch"] == name and row[figure] is not None]
            if not values:
                continue
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            off = found["off"].get(figure) if name != "off" else None
            moved = None
            if off is not None and error is not None and off["error"] is not None:
                spread = math.hypot(error, off["error"])
                moved = (statistics.fmean(values) - (off["mean"] or 0.0)) / spread if spread else None
            found[name][figure] = {"mean": statistics.fmean(values), "error": error, "moved": moved}
    return found


if __name__ == "__main__":
    sys.exit(main())
