"""Trains a small MicroDiT on the demo's corpus, and holds its validation loss against the stated one.

    python -m benchmarks.regression [--corpus DIR] [--json] [key=value ...]

The recipe is configs/recipes/regression.yaml: one process, one thread, fp32, so that the same machine repeats a run bit
by bit. Without --corpus the corpus is built first (configs/demo.yaml, without its larger latents). key=value changes
the recipe, and then there is no line to hold it against.

loss        validation loss of the moving average at the end, unmasked, over 256 drawings that were held out
stated      what it is: measured when the recipe was made (benchmarks/LOG.md)
tolerance   3 standard deviations of runs with other seeds, which draw other samples to hold out as well
holds       whether the loss is that good, null for another recipe. A much better one is a reason to state it anew
curve       [images, loss of the average] of every validation

Exit status 1 if the line does not hold.
"""

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import load_config
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.engine.build import build
from microdit.trainer.recipe import load_recipe
from microdit.trainer.train import train

RECIPE = "configs/recipes/regression.yaml"
COLUMNS = ["images", "captions/source", "captions/long", "latents/demo-64", "text/minilm@source", "text/minilm@long"]
STATED, TOLERANCE = 0.4047, 0.02  # measured: benchmarks/LOG.md


def main() -> int:
    parser = argparse.ArgumentParser(description="The validation loss of a small fixed run, beside the stated one.")
    parser.add_argument("--corpus", help="a corpus of configs/demo.yaml; without it, one is built")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the recipe")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(sys.stderr):
        try:
            corpus = given.corpus or build_corpus(Path(scratch) / "corpus")
            found = measure(corpus, Path(scratch) / "run", given.overrides)
        except RequestError as error:
            print(error, file=sys.stderr)
            return 2
    if given.json:
        print(json.dumps(found))
    else:
        stated = (
            f"stated {STATED} +- {TOLERANCE}" if found["holds"] is not None else "another recipe than the stated one"
        )
        print(
            f"validation loss {found['loss']:.6f} ({stated}) after {found['images']:,} images, {found['seconds']:.0f} s"
        )
    return 1 if found["holds"] is False else 0


def build_corpus(folder: Path) -> str:
    """Build what this benchmark trains on; returns the corpus' URL."""
    return build_columns(folder, COLUMNS)


def build_columns(folder: Path, columns: list[str]) -> str:
    """Build some columns of the demo's corpus; returns its URL."""
    config = load_config("configs/demo.yaml", corpus=str(folder))
    built = build(config, columns=columns)
    if built.exit_status:
        raise RequestError(f"the corpus could not be built: {built.text()}")
    return Corpus.open(folder).url


def measure(corpus: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Train, and return the figures."""
    torch.set_num_threads(1)
    summary = train(load_recipe(RECIPE, [f"corpus={corpus}", f"out={out}", *overrides]))
    if summary["signal"]:
        raise KeyboardInterrupt
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation" in line]
    loss = summary["validation"]

    def best(figures: dict[str, Any]) -> float:
        return figures["loss"] if figures["ema_loss"] is None else figures["ema_loss"]

    return {
        "loss": loss,
        "stated": STATED,
        "tolerance": TOLERANCE,
        "holds": None if overrides else loss <= STATED + TOLERANCE,
        "images": summary["images"],
        "parameters": summary["parameters"],
        "held_out": validated[-1]["validation"]["samples"],
        "seconds": round(summary["seconds"], 1),
        "curve": [[line["images"], best(line["validation"])] for line in validated],
    }


if __name__ == "__main__":
    sys.exit(main())
