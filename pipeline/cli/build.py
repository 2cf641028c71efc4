"""The commands that make a corpus: `build`, `plan`, `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.command import Json, Overrides, json_answer
from microdit.pipeline.cli.shown import console, in_bytes


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes.")] = Path("runs/demo"),
) -> None:
    """Everything, small, on built-in data: a corpus, a training, pictures, and a page to look at."""
    from microdit.pipeline.cli.demo import run_demo

    raise typer.Exit(run_demo(out))


def build(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/demo.yaml.")],
    overrides: Overrides = None,
    corpus: Annotated[str | None, typer.Option(metavar="URL", help="The corpus, in place of the config's.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Make these columns alone; `images` reads the sources, which may be gone otherwise."
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="Take again what was set aside, and URLs that failed for now (429, 5xx, timeout)."
        ),
    ] = False,
    retry_rows: Annotated[
        list[str] | None,
        typer.Option("--retry-rows", metavar="REASON", help="Make failed rows of this reason again, in all columns."),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read all that is there; make again what is damaged, lost or stale.")
    ] = False,
    grow: Annotated[bool, typer.Option("--grow", help="Take files that were added to the sources as well.")] = False,
    as_json: Json = False,
) -> None:
    """Build a corpus, or go on with it: everything the config asks for that is not there.

    It may be stopped or killed at any moment, and run twice at the same time: nothing is written twice. A shard that
    fails is tried again, then set aside with the reason (`microdit status` shows it), and the build goes on. On a
    cluster set `RAY_ADDRESS`. Elsewhere than on a terminal the progress is one line of JSON a minute.

    **Examples**

    - `microdit build configs/demo.yaml --corpus my/corpus`

    - `microdit build configs/demo.yaml --columns images,captions/source`

    - `microdit build configs/demo.yaml --retry-failed resources.cpus_per_task=0.5`

    - `microdit build configs/demo.yaml --retry-rows http_4xx --retry-rows timeout` when the server is well again

    - `microdit build configs/demo.yaml --repair` after `microdit verify` found damage, or `status` stale shards
    """
    from microdit.pipeline.base.progress import shown
    from microdit.pipeline.config.build import load_config
    from microdit.pipeline.engine.build import build as build_corpus

    wanted = [name.strip() for name in columns.split(",") if name.strip()] if columns is not None else None
    with json_answer(as_json) as answer, shown() as progress:
        loaded = load_config(config, overrides or (), corpus)
        how = {"retry_failed": retry_failed, "repair": repair, "grow": grow}
        summary = build_corpus(loaded, wanted, retry_rows=retry_rows or (), **how, progress=progress)
        answer.update(summary.to_dict())
    if not as_json:
        print(printable(summary.text()))
    raise typer.Exit(summary.exit_status)


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/microdit-37m.yaml.")],
    overrides: Overrides = None,
    learn_from: Annotated[
        str | None, typer.Option("--from", metavar="CORPUS", help="An earlier, smaller build to learn from.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="How many there are; without any, models run on CPUs.", min=0)] = 0,
    gpu: Annotated[str | None, typer.Option(metavar="KIND", help="What kind, e.g. h100.")] = None,
    cpus: Annotated[float | None, typer.Option(help="How many there are (16 a GPU, or as here).", min=1)] = None,
    bandwidth: Annotated[float, typer.Option(metavar="GBIT", help="Gbit/s of the network.", min=0.001)] = 10.0,
    samples: Annotated[
        list[str] | None, typer.Option(metavar="[SOURCE=]N", help="Inputs of a source that cannot say it.")
    ] = None,
    gpu_price: Annotated[float | None, typer.Option(help="$ for an hour of one GPU.", min=0)] = None,
    cpu_price: Annotated[float, typer.Option(help="$ for an hour of one CPU.", min=0)] = 0.04,
    storage_price: Annotated[float, typer.Option(help="$ for a TB and month.", min=0)] = 23.0,
    as_json: Json = False,
) -> None:
    """Estimate what a build would come to before you spend it: shards, bytes by column, time by stage, money.

    Learned from an earlier build's commits: the config's own corpus, if something of it is there, or `--from`. What
    none tells comes from shapes, from what is written about a dataset, from measurements or from arithmetic: each
    number says which, and what is assumed stands below. It is for the whole corpus, whatever of it is there already.

    **Examples**

    - `microdit plan configs/microdit-37m.yaml --from s3://my-bucket/try --gpus 8 --gpu h100`

    - `microdit plan configs/microdit-37m.yaml --gpus 8 --gpu a100 --gpu-price 1.50 sources.sa1b.units=100`
    """
    from microdit.pipeline.cli.shown_plan import show
    from microdit.pipeline.config.build import load_config
    from microdit.pipeline.estimate.estimate import Machines, estimate
    from microdit.pipeline.estimate.source_sizes import parse_samples

    machines = Machines(cpus, gpus, gpu, bandwidth, gpu_price, cpu_price, storage_price)
    with json_answer(as_json) as answer:
        estimated = estimate(load_config(config, overrides or ()), machines, learn_from, parse_samples(samples or ()))
        answer.update(estimated.to_json())
    if not as_json:
        show(estimated, console(), in_bytes)
