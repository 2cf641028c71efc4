"""The command `train`: starts the trainer with torchrun."""

import os
import sys
from typing import Annotated, Literal

import typer

from microdit.pipeline.cli.command import Overrides, torchrun


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, e.g. configs/recipes/demo.yaml.")],
    overrides: Overrides = None,
    resume: Annotated[
        Literal["auto", "never"], typer.Option(help="`auto`: go on from the newest checkpoint, if there is one.")
    ] = "auto",
) -> None:
    """Train as a recipe says, on all GPUs of this machine; the same as `torchrun ... -m microdit.trainer RECIPE`.

    The same command goes on where the run was stopped or killed: from the newest checkpoint, in `out` or, on another
    machine too, on the bucket that the recipe's `checkpoints` names.

    **Example**

    - `microdit train configs/recipes/demo.yaml corpus=my/corpus out=my/run`
    """
    from microdit.trainer.recipe import load_recipe

    load_recipe(recipe, overrides or ())  # what is wrong with it is said here, once, and not by every process
    import torch

    gpus = torch.cuda.device_count()
    launch = torchrun(gpus) if gpus > 1 else [sys.executable]
    command = [*launch, "-m", "microdit.trainer", recipe, *(overrides or ()), "--resume", resume]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # signals and the exit status are the trainer's own
