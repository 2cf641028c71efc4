"""The command line: `microdit --help`. What is heavy is imported by the command that needs it."""

import typer

from microdit.pipeline.cli.build import build, demo, plan
from microdit.pipeline.cli.choose import decontaminate, dedup, select
from microdit.pipeline.cli.command import Commands
from microdit.pipeline.cli.convert import convert
from microdit.pipeline.cli.evaluate import evaluate
from microdit.pipeline.cli.explore import explore
from microdit.pipeline.cli.generate import generate
from microdit.pipeline.cli.inspect import inspect
from microdit.pipeline.cli.look import gc, ls, query, report, status, verify
from microdit.pipeline.cli.train import train

app = typer.Typer(
    cls=Commands,
    name="microdit",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Build a latent corpus of image-caption pairs, look at it, and train a MicroDiT on it.

    **The whole road, small:** `microdit demo`

    **Step by step:**

    - `microdit build configs/demo.yaml --corpus my/corpus`

    - `microdit query my/corpus "SELECT status, count(*) FROM samples GROUP BY 1"`

    - `microdit select my/corpus large "SELECT source, shard, row FROM samples WHERE status = 'ok' AND width >= 128"`

    - `microdit train configs/recipes/demo.yaml corpus=my/corpus selection=large out=my/run`

    - `microdit generate --checkpoint my/run --prompt "red apple"`

    Whatever was stopped goes on when the same command is run again. Exit status: 0 done, 1 too much failed,
    2 the request is wrong (the message says what), 130 or 143 stopped by a signal.
    """,
)


for command in (
    *(demo, build, plan, inspect),
    *(status, report, explore, query, verify, ls, gc),
    *(select, dedup, decontaminate),
    *(convert, train, generate, evaluate),
):
    app.command()(command)


def main() -> None:
    app()
