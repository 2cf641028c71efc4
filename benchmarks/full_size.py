"""Measure the commands on a corpus of the full size: seconds, memory, requests and bytes of each.

    python -m benchmarks.full_size --rows 4000000 --work DIR [--store folder|s3] [--only query report] [--json]

Makes a corpus of so many rows and one of a quarter of them (`full_size_corpus.py` says what they have and have not),
runs each command on both in a process of its own, in the order below, and gives its figures, those at the full size of
40.6 million rows by the slope between the two, and the goal beside them. The corpora stay in DIR (ROWS/corpus) and are
taken from there by the next run; its tables and selections are removed before each run, and what it added. `--only`
runs some of the commands (and those that they need); a command that takes longer than `--timeout` is stopped, and its
figures are then at least these.

Seconds are by the clock, `cpu_seconds` those of the processor in all processes of a command: they say more where others
use the machine, too.

Memory is the largest sum over all processes of a command of what they hold for themselves (anonymous and shared, by
smaps_rollup; without pages of files), looked at ten times a second. Bytes read are those of read calls on a folder, and
those of answers on S3: moto's server, before it a proxy that answers each request 20 ms late and counts it; all of the
corpus is in the server's memory there, so take fewer rows (100,000 take 1 GB). The bucket is filled from the folder.

    first      query over numbers, the first time: what it reads of the sample table is made
    again      the same query
    grown      the same query after 1% more rows were committed
    star       select "SELECT * FROM samples WHERE ..."
    paper      select paper
    equal      select paper --weights equal
    whole      query of all columns: the rest of the sample table is made
    dedup      dedup, by hashes
    report     report
    start      what each process of the trainer does first: a recipe of two columns and the selection `paper`
    status     status
    verify     verify of captions and scores, a hundredth of the shards, where there is such an option
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from benchmarks.full_size_corpus import FULL, SOURCES, grow, layout, make_corpus, objects
from benchmarks.full_size_server import LateS3
from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.corpus.corpus import Corpus
from tests.servers.s3 import BUCKET, environment, serve

GIB = 1 << 30
LATE = 0.02
QUERY = "SELECT source, count(*) AS n, avg(width) AS width FROM samples WHERE status = 'ok' GROUP BY source"
WHOLE = "SELECT * FROM samples ORDER BY shard, row LIMIT 1"
STAR = "SELECT * FROM samples WHERE status = 'ok' AND least(width, height) >= 400"
MICRODIT = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()"]
START = [
    *(sys.executable, "-c"),
    "import sys; from microdit.trainer.recipe import load_recipe; from microdit.trainer.data.samples import "
    "open_samples; print(len(open_samples(load_recipe(sys.argv[1])).legs[0]))",
]
RECIPE = """
name: full-size
corpus: {url}
out: {folder}/run
selection: paper@{hash}
text: {{"text/dfn-clip-h@source": 1}}
model: {{preset: tiny_2}}
stages: [{{latents: latents/sdxl-256, images: 2048, learning_rate: 1e-4}}]
"""
GOALS: dict[str, dict[str, float]] = {  # at the full size
    "first": {"seconds": 300},
    "grown": {"seconds": 30},
    "again": {"seconds": 5},
    "star": {"memory_gib": 6},
    "paper": {"seconds": 60, "memory_gib": 6},
    "equal": {"seconds": 60, "memory_gib": 6},
    "whole": {"seconds": 300},
    "dedup": {"seconds": 900, "memory_gib": 8},
    "report": {"seconds": 180, "memory_gib": 4},
    "start": {"seconds": 60, "requests": 300_000},
    "status": {"seconds": 60},
    "verify": {},
}
NEEDS = {"again": "first", "grown": "first", "start": "paper"}


@dataclass(frozen=True)
class Place:
    """Locate the corpus that is measured: its URL, its folder, and what counts requests if it is on S3."""

    url: str
    folder: Path
    proxy: LateS3 | None


# -- a command in a process of its own ---------------------------------------------------------------------------------
def run(command: list[str], place: Place, timeout: float) -> dict[str, Any]:
    """Run a command; returns its figures, and its output as `said`."""
    if place.proxy is not None:
        place.proxy.clear()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=place.folder, start_new_session=True)
        memory = read = 0
        stopped = False
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            held, bytes_read = _look(process.pid)
            memory, read = max(memory, held), max(read, bytes_read)
            if time.perf_counter() - began > timeout:
                stopped = True
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        process.returncode, used = os.waitstatus_to_exitcode(ended[1]), ended[2]
        out.seek(0)
        err.seek(0)
        said, failed = out.read(), err.read()
    if process.returncode and not stopped:
        raise RuntimeError(f"{command[-3:]} ended with {process.returncode}: {failed[-3000:]}")
    found: dict[str, Any] = {"seconds": round(seconds, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
    found["memory_gib"] = round(memory / GIB, 2)
    if place.proxy is not None:
        requests = Counter(place.proxy.requests)
        found |= {"requests": sum(requests.values()), "by_method": dict(requests)}
        read = place.proxy.read
    found |= {"read_mb": round(read / 1e6, 1), "said": said}
    return found | ({"stopped": True} if stopped else {})


def _look(process: int) -> tuple[int, int]:
    """Read the bytes of memory that a process and its descendants hold, and the bytes that they have read."""
    memory = read = 0
    for one in _tree(process):
        with suppress(OSError, ValueError):  # it ends meanwhile
            rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
            memory += 1024 * sum(int(size) for size in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+)", rollup, re.M))
            read += int(Path(f"/proc/{one}/io").read_text().split()[1])
    return memory, read


def _tree(process: int) -> Iterator[int]:
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in task.read_text().split():
                yield from _tree(int(child))


# -- the commands ------------------------------------------------------------------------------------------------------
def commands(place: Place, selections: dict[str, str]) -> dict[str, Callable[[], list[str]]]:
    """Say what each measurement runs; `start` asks for the selection when it comes to it."""
    url = place.url

    def start() -> list[str]:
        path = place.folder / "recipe.yaml"
        path.write_text(RECIPE.format(url=url, folder=place.folder, hash=selections["paper"]))
        return [*START, str(path)]

    return {
        "first": lambda: [*MICRODIT, "query", url, QUERY],
        "again": lambda: [*MICRODIT, "query", url, QUERY],
        "grown": lambda: [*MICRODIT, "query", url, QUERY],
        "star": lambda: [*MICRODIT, "select", url, "star", STAR],
        "paper": lambda: [*MICRODIT, "select", url, "paper"],
        "equal": lambda: [*MICRODIT, "select", url, "paper", "--weights", "equal"],
        "whole": lambda: [*MICRODIT, "query", url, WHOLE],
        "dedup": lambda: [*MICRODIT, "dedup", url],
        "report": lambda: [*MICRODIT, "report", url, "--out", str(place.folder / "report.html")],
        "start": start,
        "status": lambda: [*MICRODIT, "status", url, "--json"],
        "verify": lambda: [*MICRODIT, "verify", url, "--columns", "captions/source,scores/basic", "--sample", "0.01"],
    }


def measure(place: Place, rows: int, only: list[str], timeout: float) -> dict[str, Any]:
    """Run all commands on one corpus; returns their figures by name."""
    selections: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name, command in commands(place, selections).items():
        if name not in only or (name == "verify" and not _knows_sample()):
            continue
        print(f"{rows:,} rows: {name}", file=sys.stderr, flush=True)
        if name == "grown":
            corpus, before = Corpus.open(place.folder / "corpus"), set(objects(place.folder / "corpus"))
            grow(corpus, rows)
            if place.proxy is not None:
                _upload(place, sorted(set(objects(place.folder / "corpus")) - before))
        found[name] = run(command(), place, timeout)
        said = found[name].pop("said")
        if name in ("star", "paper", "equal") and (chosen := re.search(r"@([0-9a-f]{16})", said)):
            selections.setdefault(name, chosen[1])
            found[name]["selection"] = chosen[1]
        print(json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def _knows_sample() -> bool:
    said = subprocess.run([*MICRODIT, "verify", "--help"], capture_output=True, text=True)
    return "--sample" in said.stdout


# -- the corpora -------------------------------------------------------------------------------------------------------
@contextmanager
def placed(work: Path, rows: int, store: str) -> Iterator[Place]:
    """Make a corpus, or bring it back to what it was made as, and put it where it is measured."""
    folder = work / str(rows)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{rows:,} rows: the corpus is made in {folder}", file=sys.stderr, flush=True)
    make_corpus(folder / "corpus", rows, os.cpu_count() or 1)
    _restore(folder / "corpus", rows)
    if store == "folder":
        yield Place(str(folder / "corpus"), folder, None)
        return
    with serve() as server, LateS3(server, LATE) as proxy:
        os.environ.update(environment(server))
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        _upload(Place("", folder, None), sorted(objects(folder / "corpus")))
        os.environ.update(environment(proxy.url))
        yield Place(f"s3://{BUCKET}/corpus", folder, proxy)


def _restore(corpus: Path, rows: int) -> None:
    """Remove what a run made and added."""
    for folder in ("tables", "selections"):
        shutil.rmtree(corpus / folder, ignore_errors=True)
    source = list(SOURCES)[-1]
    first = sum(unit.source == source for unit in layout(rows))
    for path in corpus.rglob(f"{source}/{source}-*"):
        if path.is_file() and int(re.split(r"[-.]", path.name)[1]) >= first:
            path.unlink()


def _upload(place: Place, names: list[str]) -> None:
    client = boto3.client("s3")
    root = place.folder / "corpus"

    def put(name: str) -> None:
        client.put_object(Bucket=BUCKET, Key=f"corpus/{name}", Body=(root / name).read_bytes())

    ordered = sorted(names, key=lambda name: name.startswith("commits/"))  # commits name what is there
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(put, ordered):
            pass


# -- at the full size --------------------------------------------------------------------------------------------------
def extrapolated(small: tuple[int, dict[str, Any]], large: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    """Extrapolate a command's figures to the full size, by the slope between two sizes; each beside its goal."""
    (fewer, less), (more, much) = small, large
    found: dict[str, Any] = {}
    for figure in ("seconds", "cpu_seconds", "memory_gib", "requests", "read_mb"):
        if figure in much and figure in less:
            slope = max(0.0, (much[figure] - less[figure]) / (more - fewer))
            found[figure] = round(much[figure] + slope * (FULL - more), 1)
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=4_000_000, help="of the larger corpus")
    parser.add_argument("--store", choices=("folder", "s3"), default="folder")
    parser.add_argument("--work", type=Path, help="a folder that keeps the corpora (default: a temporary one)")
    parser.add_argument("--only", nargs="+", choices=list(GOALS), default=list(GOALS), metavar="COMMAND")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of one command")
    options: argparse.Namespace = parser.parse_args()
    only = set(options.only)
    while needed := {NEEDS[name] for name in only if name in NEEDS} - only:
        only |= needed
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        sizes: dict[int, dict[str, Any]] = {}
        for rows in (options.rows // 4, options.rows):
            with placed(work, rows, options.store) as place:
                sizes[rows] = measure(place, rows, [*only], options.timeout)
    (fewer, less), (more, much) = sizes.items()
    found: dict[str, Any] = {"store": options.store, "cores": len(os.sched_getaffinity(0)), "full_rows": FULL}
    for name in much:
        full = extrapolated((fewer, less[name]), (more, much[name]))
        found[name] = {str(fewer): less[name], str(more): much[name], "at_full_size": full, "goal": GOALS[name]}
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
