"""The commands that look at a corpus: `status`, `report`, `query`, `verify`, `ls`, `gc`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from microdit.pipeline.base.signals import stop_signals
from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.command import (
    CorpusUrl,
    Disk,
    Json,
    Memory,
    Sql,
    Timeout,
    json_answer,
    open_corpus,
    sql_limits,
)
from microdit.pipeline.cli.shown import print_garbage, print_rows, print_status


def status(corpus: CorpusUrl, as_json: Json = False) -> None:
    """Print how far a corpus is: by source and column what is done, failed and left, bytes, and rates.

    `aside` are shards that failed as a whole, with the message below: `microdit build CONFIG --retry-failed` takes them
    again. `stale` are shards of which an input was made again since: `microdit build CONFIG --repair` mends them.
    `failed` are single samples; `microdit query` tells the reasons, and `--retry-failed` or `--retry-rows` make those
    again that may not fail another time.
    """
    from microdit.pipeline.upkeep.status import status as status_of

    with json_answer(as_json) as answer:
        result = status_of(open_corpus(corpus))
        answer.update(result.to_dict())
    if not as_json:
        print_status(result)


def report(
    corpus: CorpusUrl,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Default: report.html here.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="A training run to show with it.")] = None,
) -> None:
    """Write one self-contained page: what came in, what was dropped and why, pictures, sizes, rates."""
    from microdit.pipeline.report.page import write_report

    print(printable(str(write_report(open_corpus(corpus), out, run))))


def query(
    corpus: CorpusUrl,
    sql: Sql,
    timeout: Timeout = None,
    memory: Memory = None,
    disk: Disk = None,
    as_json: Json = False,
) -> None:
    """Ask the sample table, one line per input, with DuckDB's SQL.

    The SQL may be anybody's: it reaches nothing but the view `samples`, and takes no more than the options say.

    **Examples**

    - `microdit query my/corpus "SELECT reason, count(*) AS n FROM samples WHERE status = 'failed' GROUP BY 1"`

    - `microdit query my/corpus "SELECT * FROM samples LIMIT 1" --json` shows the columns that there are
    """
    from microdit.pipeline.selection.view import query_apart

    with json_answer(as_json) as answer, stop_signals():
        table = query_apart(open_corpus(corpus), sql, sql_limits(timeout, memory, disk))
        answer.update({"columns": table.column_names, "rows": table.to_pylist()})
    if not as_json:
        print_rows(answer["columns"], answer["rows"])


def verify(
    corpus: CorpusUrl,
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Read the objects of these columns alone, separated by commas."),
    ] = None,
    source: Annotated[str | None, typer.Option(metavar="NAME", help="Check one source.")] = None,
    sample: Annotated[
        float, typer.Option(metavar="SHARE", help="Check a share of the shards, above 0; 1 is all.", max=1)
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Which shards --sample draws.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Check every object: checksums, counts, keys, lineage, in = out + failed. Exit status 1 if something is wrong.

    Every byte is read, and every fault named. `microdit build CONFIG --repair` makes again what is damaged, lost or
    stale. Where RAY_ADDRESS names a Ray cluster, all its machines read (`RAY_ADDRESS=local`: all CPUs of this one).

    **Example**

    - `microdit verify my/corpus --sample 0.01 --seed 7` reads a hundredth of the shards; another seed other ones
    """
    from microdit.pipeline.base.threads import threaded
    from microdit.pipeline.cli.shown_verify import print_verification, verify_progress
    from microdit.pipeline.upkeep.verify import VerifiedPart
    from microdit.pipeline.upkeep.verify import verify as verify_all

    part = None
    if columns is not None or source is not None or sample != 1:
        part = VerifiedPart(columns.split(",") if columns else [], source, sample, seed)
    spread: Any = threaded
    if os.environ.get("RAY_ADDRESS"):
        from microdit.pipeline.engine.spread import spread
    with json_answer(as_json) as answer, stop_signals(), verify_progress() as progress:
        result = verify_all(open_corpus(corpus), progress, part, spread)
        answer.update(result.to_dict())
    if not as_json:
        print_verification(result)
    raise typer.Exit(0 if result.ok else 1)


def ls(
    corpus: CorpusUrl,
    column: Annotated[str, typer.Argument(help="A column, e.g. latents/demo-64.", show_default=False)],
) -> None:
    """Print the committed objects of a column, one name a line: what webdataset or datasets can read."""
    from microdit.pipeline.upkeep.ls import ls as names_of

    for name in names_of(open_corpus(corpus), column):
        print(printable(name))


def gc(
    corpus: CorpusUrl,
    older_than_hours: Annotated[
        float,
        typer.Option(metavar="HOURS", help="Leave what is younger; below 12 only if nothing else writes here.", min=0),
    ] = 48,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what no commit names: leftovers of killed workers and of lost races.

    Other corpora below the root, and files that this corpus did not write, are left alone. While a build is at work on
    the corpus, what is younger than 12 hours is left to it.
    """
    from microdit.pipeline.upkeep.gc import gc as collect

    with json_answer(as_json) as answer:
        result = collect(open_corpus(corpus), older_than_hours=older_than_hours, dry_run=dry_run)
        answer.update(asdict(result))
    if not as_json:
        print_garbage(result)
