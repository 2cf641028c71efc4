"""Run a recipe: `python -m microdit.trainer RECIPE [key=value ...]`, or with `torchrun ... -m` on many GPUs."""

import argparse
import sys
from collections.abc import Sequence

from microdit.model.checkpoint import CheckpointError
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.terminal import printable
from microdit.trainer.processes import SAID
from microdit.trainer.recipe import load_recipe
from microdit.trainer.train import train


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m microdit.trainer", description="Train MicroDiT as a recipe says.")
    parser.add_argument("recipe", help="a YAML file, e.g. configs/recipes/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. out=runs/a stages.0.images=20000")
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="auto: go on from the newest checkpoint, if any"
    )
    given = parser.parse_intermixed_args(arguments)
    try:
        summary = train(load_recipe(given.recipe, given.overrides), resume=given.resume == "auto")
    except (RequestError, CheckpointError) as error:
        if SAID not in getattr(error, "__notes__", ()):
            print(printable(str(error)), file=sys.stderr)
        return 2
    return 128 + summary["signal"] if summary["signal"] else 0


if __name__ == "__main__":
    sys.exit(main())
