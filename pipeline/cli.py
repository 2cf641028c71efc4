"""The command line: `microdit --help`. What is heavy is imported by the command that needs it."""

import contextlib
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pipeline.cli_shown import console, in_bytes, print_rows, print_status, print_verified
from pipeline.convert import convert
from pipeline.errors import RequestError
from pipeline.generate import generate


class Commands(TyperGroup):
    """Exit status 2 with one message if the request is wrong or a disk full, 128 + the signal's number if one came."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RequestError as error:
            print(f"microdit: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = f": {error.filename}" if error.filename else ""
            print(f"microdit: {error.strerror}{place}; with more room the same command goes on", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stopped:
            print(f"\nmicrodit: {stopped or 'stopped; run the same command again and it goes on'}", file=sys.stderr)
            raise typer.Exit(128 + getattr(stopped, "signum", signal.SIGINT)) from None


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

CorpusUrl = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A folder, or s3://bucket/prefix (gs://, az://).", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Sql = Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over the view `samples`.", show_default=False)]
Distance = Annotated[int, typer.Option(metavar="BITS", help="How many of the 64 bits may differ, 0 to 8.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the file, e.g. shard_samples=64.", show_default=False),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes.")] = Path("runs/demo"),
) -> None:
    """Everything, small, on built-in data: a corpus, a training, pictures, and a page to look at."""
    from pipeline.demo import run_demo

    raise typer.Exit(run_demo(out))


@app.command()
def build(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, e.g. configs/demo.yaml.")],
    overrides: Overrides = None,
    corpus: Annotated[str | None, typer.Option(metavar="URL", help="The corpus, in place of the config's.")] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B", help="Make these columns alone; `images` reads the sources.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Take again the shards and units that were set aside.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read all that is there; make again what is damaged, lost or stale.")
    ] = False,
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

    - `microdit build configs/demo.yaml --repair` after `microdit verify` found damage, or `status` stale shards
    """
    from pipeline.config import load_config
    from pipeline.engine import build as build_corpus
    from pipeline.progress import shown

    wanted = [name.strip() for name in columns.split(",") if name.strip()] if columns is not None else None
    with _answer(as_json) as answer, shown() as progress:
        loaded = load_config(config, overrides or (), corpus)
        summary = build_corpus(loaded, wanted, retry_failed=retry_failed, repair=repair, progress=progress)
        answer.update(summary.to_dict())
    if not as_json:
        print(summary.text())
    raise typer.Exit(summary.exit_status)


@app.command()
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
    """What a build would come to before you spend it: shards, bytes by column, time by stage, money.

    Learned from an earlier build's commits: the config's own corpus, if something of it is there, or `--from`. What
    none tells comes from shapes, from what is written about a dataset, from measurements or from arithmetic: each
    number says which, and what is assumed stands below. It is for the whole corpus, whatever of it is there already.

    **Examples**

    - `microdit plan configs/microdit-37m.yaml --from s3://my-bucket/try --gpus 8 --gpu h100`

    - `microdit plan configs/microdit-37m.yaml --gpus 8 --gpu a100 --gpu-price 1.50 sources.sa1b.units=100`
    """
    from pipeline.config import load_config
    from pipeline.estimate import Machines, estimate
    from pipeline.estimate_shown import show
    from pipeline.expected import parse_samples

    machines = Machines(cpus, gpus, gpu, bandwidth, gpu_price, cpu_price, storage_price)
    with _answer(as_json) as answer:
        answer.update(
            estimate(load_config(config, overrides or ()), machines, learn_from, parse_samples(samples or ()))
        )
    if not as_json:
        show(answer, console(), in_bytes)


@app.command()
def status(corpus: CorpusUrl, as_json: Json = False) -> None:
    """How far a corpus is: by source and column what is done, failed and left, bytes, and rates.

    `aside` are shards that failed as a whole, with the message below: `microdit build CONFIG --retry-failed` takes them
    again. `stale` are shards of which an input was made again since: `microdit build CONFIG --repair` mends them.
    `failed` are single samples; `microdit query` tells the reasons.
    """
    from pipeline.check import status as status_of

    with _answer(as_json) as answer:
        answer.update(status_of(_open(corpus)))
    if not as_json:
        print_status(answer)


@app.command()
def report(
    corpus: CorpusUrl,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Default: report.html here.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="A training run to show with it.")] = None,
) -> None:
    """One self-contained page: what came in, what was dropped and why, pictures, sizes, rates."""
    from pipeline.report import write_report

    print(write_report(_open(corpus), out, run))


@app.command()
def query(corpus: CorpusUrl, sql: Sql, as_json: Json = False) -> None:
    """Ask the sample table, one line per input, with DuckDB's SQL.

    **Examples**

    - `microdit query my/corpus "SELECT reason, count(*) AS n FROM samples WHERE status = 'failed' GROUP BY 1"`

    - `microdit query my/corpus "SELECT * FROM samples LIMIT 1" --json` shows the columns that there are
    """
    from pipeline.samples import query as run_query

    with _answer(as_json) as answer:
        table = run_query(_open(corpus), sql)
        answer.update({"columns": table.column_names, "rows": table.to_pylist()})
    if not as_json:
        print_rows(answer["columns"], answer["rows"])


@app.command()
def select(
    corpus: CorpusUrl,
    name: Annotated[str, typer.Argument(help="The selection's name.", show_default=False)],
    sql: Annotated[
        str | None, typer.Argument(metavar="SQL", help="One SELECT over the view `samples`.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="SHARES", help="How often each source comes: equal, or A=2,B=1. Default: by its size."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Save a selection: the rows (`source`, `shard`, `row`, and `weight` if you like) that a query gives.

    Without SQL it is the query of that name in configs/queries: `clean` (once, safe, sharp, in no test set, little
    text), `paper` and `paper-512` (the paper's data), `synthetic-only`. With `--weights` a source comes as often as
    its share says, however many samples it has; a `weight` of the query then counts within its source.

    **Examples**

    - `microdit select my/corpus large "SELECT source, shard, row FROM samples WHERE status = 'ok' AND width >= 128"`

    - `microdit select my/corpus clean --weights cc12m=2,sa1b=1`
    """
    from pipeline.selections import select as select_rows
    from pipeline.weights import parse_shares

    with _answer(as_json) as answer:
        shares = None if weights is None else parse_shares(weights)
        chosen = select_rows(_open(corpus), name, sql, shares)
        answer.update({"name": chosen.name, "hash": chosen.hash, "path": chosen.path, "rows": chosen.rows})
    if not as_json:
        print(f"{chosen.name}@{chosen.hash}: {chosen.rows:,} rows")


@app.command()
def dedup(
    corpus: CorpusUrl,
    distance: Annotated[
        int | None, typer.Option(metavar="BITS", help="How many of the 64 bits may differ, 0 to 8; 6 if not given.")
    ] = None,
    semantic: Annotated[bool, typer.Option("--semantic", help="By embeddings: the same in other pixels.")] = False,
    similarity: Annotated[
        float | None, typer.Option(metavar="COSINE", help="With --semantic: at least this near; 0.95 if not given.")
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="With --semantic, if there are several: which embeddings.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find pictures that are double or nearly so; remove nothing. For a corpus that has changed run it again.

    By the hashes of `scores/basic`: `samples` gains `duplicate_group` (the id of the one to keep: the largest, then
    the first), `duplicate_distance` (bits between the two), `duplicate_exact` (the same pixels came before) and
    `duplicate_keep`. By the embeddings of `scores/embedding`, with `--semantic`: `semantic_group`,
    `semantic_similarity` (the cosine) and `semantic_keep`, beside the others.

    **Examples**

    - `microdit dedup my/corpus`

    - `microdit dedup my/corpus --semantic --similarity 0.97`

    - `microdit select my/corpus once "SELECT source, shard, row FROM samples WHERE duplicate_keep AND semantic_keep"`
    """
    from pipeline.duplicates import dedup as find
    from pipeline.semantic import dedup_semantic

    with _answer(as_json) as answer:
        if semantic and distance is not None:
            raise RequestError("--distance counts bits of hashes; with --semantic give --similarity")
        if not semantic and (similarity, embedding) != (None, None):
            raise RequestError("--similarity and --embedding are of embeddings; give --semantic with them")
        if semantic:
            answer.update(dedup_semantic(_open(corpus), embedding, 0.95 if similarity is None else similarity))
        else:
            answer.update(find(_open(corpus), 6 if distance is None else distance))
    if as_json:
        return
    what = (
        f"{answer['without_embedding']:,} more have no embedding in {answer['column']}"
        if semantic
        else f"{answer['exact']:,} repeat another one's pixels; {answer['without_hash']:,} more have no hash"
    )
    print(
        f"{answer['groups']:,} groups: {answer['kept']:,} of {answer['samples']:,} samples to keep, "
        f"{answer['dropped']:,} to drop; {what}"
    )


@app.command()
def decontaminate(
    corpus: CorpusUrl,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="CORPUS|FILE", help="An evaluation set: a corpus, or its hash table. May be repeated."),
    ] = None,
    distance: Distance = 6,
    as_json: Json = False,
) -> None:
    """Mark pictures that are in an evaluation set, or nearly so; remove nothing.

    Without `--against` that is COCO 2014 val, from the corpus that `microdit build configs/coco-val.yaml` makes here.
    `samples` gains `contaminated`, `contaminated_by` (whose picture) and `contaminated_distance`.

    **Example**

    - `microdit select my/corpus clean "SELECT source, shard, row FROM samples WHERE NOT contaminated"`
    """
    from pipeline.duplicates import decontaminate as find
    from pipeline.duplicates import default_evaluation

    with _answer(as_json) as answer:
        answer.update(find(_open(corpus), against or [default_evaluation()], distance))
    if not as_json:
        print(
            f"{answer['contaminated']:,} of {answer['samples']:,} samples are near an evaluation set "
            f"({', '.join(entry['name'] for entry in answer['against'])}), {answer['exact']:,} of them with the same "
            f"pixels; {answer['without_hash']:,} more have no hash"
        )


@app.command()
def verify(corpus: CorpusUrl, as_json: Json = False) -> None:
    """Check every object: checksums, counts, keys, lineage, in = out + failed. Exit status 1 if something is wrong.

    Every byte is read, and every fault named. `microdit build CONFIG --repair` makes again what is damaged, lost or
    stale.
    """
    from pipeline.check import verify as verify_all

    with _answer(as_json) as answer:
        answer.update(verify_all(_open(corpus)))
    if not as_json:
        print_verified(answer)
    raise typer.Exit(1 if answer["problems"] else 0)


@app.command()
def ls(
    corpus: CorpusUrl,
    column: Annotated[str, typer.Argument(help="A column, e.g. latents/demo-64.", show_default=False)],
) -> None:
    """The committed objects of a column, one name a line: what webdataset or datasets can read."""
    from pipeline.check import ls as names_of

    for name in names_of(_open(corpus), column):
        print(name)


@app.command()
def gc(
    corpus: CorpusUrl,
    older_than_hours: Annotated[float, typer.Option(metavar="HOURS", help="Leave what is younger.", min=0)] = 48,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what no commit names: leftovers of killed workers and of lost races."""
    from pipeline.check import gc as collect

    with _answer(as_json) as answer:
        answer.update(collect(_open(corpus), older_than_hours=older_than_hours, dry_run=dry_run))
    if not as_json:
        for name in answer["names"]:
            print(name)
        counts = ", ".join(f"{answer[what]:,} {what}" for what in ("attempts", "tables", "unfinished", "uploads"))
        print(f"{'would remove' if dry_run else 'removed'} {counts}; {in_bytes(answer['bytes'])}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, e.g. configs/recipes/demo.yaml.")],
    overrides: Overrides = None,
    resume: Annotated[
        Literal["auto", "never"], typer.Option(help="`auto`: go on from the newest checkpoint, if there is one.")
    ] = "auto",
) -> None:
    """Train as a recipe says, on all GPUs of this machine; the same as `torchrun ... -m trainer RECIPE`.

    The same command goes on where the run was stopped or killed: from the newest checkpoint, in `out` or, on another
    machine too, on the bucket that the recipe's `checkpoints` names.

    **Example**

    - `microdit train configs/recipes/demo.yaml corpus=my/corpus out=my/run`
    """
    from trainer.recipe import load_recipe

    load_recipe(recipe, overrides or ())  # what is wrong with it is said here, once, and not by every process
    import torch

    gpus = torch.cuda.device_count()
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *launch, "-m", "trainer", recipe, *(overrides or ()), "--resume", resume]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # signals and the exit status are the trainer's own


app.command()(convert)
app.command()(generate)


def main() -> None:
    app()


# -- helpers -----------------------------------------------------------------------------------------------------------


def _open(url: str) -> Any:
    from pipeline.corpus import Corpus

    return Corpus.open(url)


@contextlib.contextmanager
def _answer(as_json: bool) -> Iterator[dict[str, Any]]:
    """A dictionary to fill; with `--json` it is what is printed, and what others print goes to standard error."""
    answer: dict[str, Any] = {}
    if not as_json:
        yield answer
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield answer
    print(json.dumps(_finite(answer), default=str, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
