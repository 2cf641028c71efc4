"""`microdit demo`: the whole road, small and real, from URLs to pictures and a page to look at.

Every step is what a user would run, and each goes on where it was stopped: the build from its commits, the selection
from its hash, the training from its last checkpoint. So running the demo again, after a kill too, is always right.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.progress import shown
from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.command import torchrun
from microdit.pipeline.cli.demo_plan import RECIPE, plan_training
from microdit.pipeline.config.build import BuildConfig, load_config
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.engine.build import build
from microdit.pipeline.report.page import write_report
from microdit.pipeline.selection.selections import Selection, select
from microdit.pipeline.selection.view import query
from microdit.pipeline.upkeep.verify import verify

TIME_LIMIT = 8 * 60  # seconds for everything on 2 cores; the training gets what the build left of it, but for
AFTER_TRAINING = 40  # the pictures and the page
STARTING = 15  # of the training's time pass until the first step
LEAST_TRAINING = 60
SAMPLING_STEPS = 4  # seven calls of the network for a picture: with 30 steps it is the same

# What it trains on; configs/demo.yaml has more, for which `microdit build` may be run on the same corpus afterwards.
COLUMNS = [
    "images", "captions/source", "captions/plain", "scores/basic",
    "latents/demo-64", "text/minilm@source", "text/minilm@plain",
]  # fmt: skip

# glibc keeps what a step has freed: a page fault for each 4 KB of every step is a twelfth of the processor's time. The
# values are the caller's, if there are some.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


OUTCOMES = """
SELECT CASE WHEN status = 'ok' THEN 'ok' ELSE reason END AS outcome, count(*) AS images,
       round(avg(caption_source_tokens), 1) AS words, round(avg(caption_plain_tokens), 1) AS words_plain,
       round(avg(basic_entropy), 2) AS entropy
FROM samples GROUP BY 1 ORDER BY 2 DESC
"""


def run_demo(out: Path, build_overrides: Sequence[str] = (), train_overrides: Sequence[str] = ()) -> int:
    """Build, choose, train, draw, verify and report below `out`; returns the exit status of the command.

    The overrides (`key=value`) change configs/demo.yaml and configs/recipes/demo.yaml, to make it smaller still.

    Raises:
        RequestError: something about the request is wrong; the message says what.
    """
    began = time.monotonic()
    console, run = Console(highlight=False, emoji=False), out / "run"
    out.mkdir(parents=True, exist_ok=True)
    steps = _Steps(console)

    command = f"microdit build configs/demo.yaml --columns {','.join(COLUMNS)}"
    steps.begin("building a corpus from a list of URLs", command)
    config = load_config("configs/demo.yaml", build_overrides, corpus=str(out / "corpus"))
    if status := _build(config, console):
        return status
    corpus = Corpus.open(config.corpus)

    steps.begin("looking at it, and choosing by SQL", "microdit query ..., microdit select ...")
    left = partial(_training_time, began)
    selection = _select(corpus, run, left(), console)

    steps.begin("training a small MicroDiT on it", "torchrun -m microdit.trainer configs/recipes/demo.yaml")
    if status := _train(corpus, selection, run, left(), train_overrides):
        return status

    steps.begin("drawing what it learned, from captions alone", "")
    _draw(run, console)

    steps.begin("checking every byte", "microdit verify ...")
    if status := _verify(corpus, console):
        return status
    report = write_report(corpus, out / "report.html", run)

    steps.begin(f"done in {(time.monotonic() - began) / 60:.1f} minutes", "")
    _say(console, f"  pictures   {run / 'grid.png'}\n  report     {report}")
    prompt = "a red apple"
    _say(console, f"  your turn  microdit generate --checkpoint {run} --prompt '{prompt}'")
    return 0


class _Steps:
    """Print numbered headings, each with the command that does the same."""

    def __init__(self, console: Console):
        self.console, self.number = console, 0

    def begin(self, text: str, command: str) -> None:
        self.number += 1
        command = f"   [dim]{command}[/dim]" if command else ""
        self.console.print(f"\n[bold]{self.number}. {text}[/bold]{command}", soft_wrap=True)


def _build(config: BuildConfig, console: Console) -> int:
    """Build the corpus, or go on with it; returns the build's exit status."""
    with shown(console) as progress:
        built = build(config, COLUMNS, progress=progress)
    _say(console, built.text())
    return built.exit_status


def _training_time(began: float) -> float:
    """Compute the seconds that are left for the training of a demo that began then."""
    return max(TIME_LIMIT - AFTER_TRAINING - (time.monotonic() - began), LEAST_TRAINING)


def _select(corpus: Corpus, run: Path, seconds: float, console: Console) -> Selection:
    """Print what came in, and save the selection to train on: as many drawings as can be learned in so many seconds."""
    outcomes = query(corpus, OUTCOMES)
    console.print(_as_table(outcomes.column_names, zip(*outcomes.to_pydict().values(), strict=True)), markup=False)
    plan = plan_training(corpus, run, seconds - STARTING, *_processes())
    _say(console, plan.text())
    selection = select(corpus, "demo", plan.sql)
    _say(console, f"selection {selection.name}@{selection.hash}: {selection.rows:,} images, duplicates left out")
    return selection


def _train(corpus: Corpus, selection: Selection, run: Path, budget: float, overrides: Sequence[str]) -> int:
    """Train for at most `budget` seconds, in processes of their own; returns the trainer's exit status.

    Every core is used unless OMP_NUM_THREADS says less.
    """
    processes, threads = _processes()
    command = [*torchrun(processes), "-m", "microdit.trainer", str(RECIPE)]
    command += [f"corpus={corpus.url}", f"selection={selection.name}@{selection.hash}", f"out={run}"]
    command += [f"time_budget={budget:.0f}", *overrides]
    environment = KEEP_MEMORY | os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal sends the signal to the trainer too: it saves a checkpoint and ends
            process.send_signal(signal.SIGINT)
            return process.wait()


def _processes() -> tuple[int, int]:
    """Choose how many processes train, and the threads of each.

    On a CPU a network as small as the demo's hardly gains by a second thread, but by a second process it does; the
    samples and their order are the same for any number.
    """
    import torch

    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    processes = 1 if torch.cuda.is_available() else max(n for n in (1, 2, 4) if n <= cores)
    return processes, max(1, cores // processes)


def _draw(run: Path, console: Console) -> None:
    """Draw pictures from captions, and print what was learned beside what the network knew before its first step."""
    names, rows = _figure_rows(_evaluate(run))
    console.print(_as_table(names, rows), markup=False)
    _say(console, f"real beside generated: {run / 'grid.png'}")


def _evaluate(run: Path) -> dict[str, Any]:
    """Read the figures of the newest checkpoint, made if they are not there yet."""
    import torch

    from microdit.model.checkpoint import CheckpointError
    from microdit.model.loading import find_checkpoint
    from microdit.pipeline.cli.demo_evaluation import evaluate

    path = run / "evaluation.json"
    try:
        if path.is_file() and (figures := json.loads(path.read_text()))["checkpoint"] == find_checkpoint(run).name:
            return figures
        # as few as train: so small a network gains little, and on a busy machine each operation waits for all threads
        torch.set_num_threads(_processes()[1])
        return evaluate(run, num_inference_steps=SAMPLING_STEPS)
    except CheckpointError as error:
        raise RequestError(str(error)) from error


def _figure_rows(figures: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Return the column names, and rows: what is measured, the trained network's figure, the untrained one's."""
    count, held_out = figures["count"], figures["held_out_count"]

    def row(text: str, name: str, form: str) -> tuple[str, str, str]:
        trained, untrained = (
            "" if value is None else form.format(value) for value in (figures[name], figures["untrained"][name])
        )
        return text, trained, untrained

    return ["of pictures generated from captions", "trained", "untrained"], [
        row(f"nearest to their own image, of {count}", "nearest_in_count", "{}"),
        row(f"nearest to their own image, of all {figures['images']:,}", "nearest_in_all", "{}"),
        row(f"never trained on, nearest to their own, of {held_out}", "held_out_nearest_in_count", "{}"),
        row("PSNR against their own image, dB", "psnr", "{:.1f}"),
        row("the same, never trained on, dB", "held_out_psnr", "{:.1f}"),
    ]


def _verify(corpus: Corpus, console: Console) -> int:
    """Read every byte of the corpus; print the first problems and return 1 if there are any."""
    result = verify(corpus)
    if not result.ok:
        _say(console, "\n".join(map(str, result.problems[:20])))
        return 1
    console.print("every object, count, key and lineage is right")
    return 0


def _as_table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in names:
        table.add_column(printable(name))
    for row in rows:
        table.add_row(*("" if value is None else printable(str(value)) for value in row))
    return table


def _say(console: Console, text: str) -> None:
    """Print a text as it is, but for control characters, and without line breaks of ours."""
    console.print(printable(text), markup=False, emoji=False, soft_wrap=True)
