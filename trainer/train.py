"""The training loop: a recipe in, checkpoints, logs and a summary out."""

from contextlib import ExitStack
from typing import Any

from microdit.trainer.recipe import Recipe
from microdit.trainer.run import Run


def train(recipe: Recipe, resume: bool = True) -> dict[str, Any]:
    """Run a recipe to its end, or go on with it from the newest checkpoint (without `resume` one is refused).

    Returns a summary: checkpoint (where it is), images, steps, seconds, loss (of the last line of the log), validation
    (the last loss of what is held out, or None), skipped, scale, parameters, and `signal`, the number of the signal
    that stopped the run, or 0.

    Raises:
        RequestError: corpus, selection, columns, network or checkpoint do not fit the recipe.
        model.checkpoint.CheckpointError: none of the checkpoints can be read, or the last one cannot be written.
    """
    with ExitStack() as stack:
        run = Run(recipe, stack)
        run.resume(resume)
        run.prepare()
        run.look()
        while run.goes_on():
            with run.batches() as batches:
                for batch in batches:
                    run.step(batch)
                    run.report()
                    if run.asked_to_stop():
                        break
                    run.look()
                    run.save_if_due()
                    if run.replanned:
                        break
            run.end_leg()
        run.finish()
        return run.summary()
