"""A million shards of a stage that does nothing: planned, built for a while, resumed, and asked for.

    python benchmarks/scale.py [--shards 1000000] [--commits 3000] [--folder DIR] [--json]

The commits of the images, and at the end those of the stage, are written as bare files: as real as any, but for the
objects that they name, which nobody opens here. Between the two a real driver works on the plan of all shards with two
workers, until it has made `--commits` of them. Goals: memory of the driver below 2,000 MB, at least 200 commits a
second on 2 cores on a local folder, `status` below 10 s after compaction (which the first `status` does), and on S3 one
request for each 1,000 commits that are listed.
"""

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import boto3

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.base.progress import Snapshot
from microdit.pipeline.base.signals import Stopped
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS, commit_name, shard_name, unit_name
from microdit.pipeline.corpus.records import Commit, ObjectRef, ShardRef, UnitCommit, canonical
from microdit.pipeline.corpus.rows import latest
from microdit.pipeline.engine.build import carry_out
from microdit.pipeline.engine.plan import Plan
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.stage import ColumnSpec, Task
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3 import BUCKET, environment, serve

SOURCE, COLUMN, UNIT_SHARDS = "made", "captions/nothing", 100
ON_S3 = 2_500  # shards there: more than two pages of each column


class Nothing:
    """A stage that writes one line for each shard."""

    name, device = "nothing", None

    def __init__(self) -> None:
        spec = ColumnSpec({"stage": "nothing"}, {"caption": "string", "tokens": "int32"}, (IMAGES,))
        self.columns = {COLUMN: spec}

    def load(self) -> None:
        pass

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        inputs = [latest(corpus, IMAGES, task.ref)]
        with begin_attempt(corpus, COLUMN, task.ref, inputs, task.columns[COLUMN]) as attempt:
            attempt.add(0, task.ref.shard, caption="nothing", tokens=1)
            return [attempt.commit()]


class Made:
    """A source whose units are all read."""

    name = SOURCE
    terms = "made for a benchmark"

    def __init__(self, shards: int):
        self._count = math.ceil(shards / UNIT_SHARDS)

    def stage(self) -> dict[str, Any]:
        return {"adapter": "made", "units": self._count}

    def units(self) -> list[str]:
        return [unit_name(SOURCE, number) for number in range(self._count)]

    def running(self, corpus: Corpus, say: Callable[[str], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        raise AssertionError("all units are read")


def new_corpus(url: str, shards: int) -> Corpus:
    corpus = Corpus.create(url, "scale", shard_samples=1)
    corpus.declare_source(SOURCE, Made(shards).stage())
    corpus.declare_column(IMAGES, {"stage": "images"})
    for column, spec in Nothing().columns.items():
        corpus.declare_column(column, spec.stage, spec.scalars)
    return corpus


def refs(shards: int) -> list[ShardRef]:
    units = [unit_name(SOURCE, number // UNIT_SHARDS) for number in range(shards)]
    return [
        ShardRef.model_construct(source=SOURCE, unit=unit, shard=shard_name(unit, number % UNIT_SHARDS))
        for number, unit in enumerate(units)
    ]


def commit_bytes(corpus: Corpus, column: str) -> Callable[[ShardRef], bytes]:
    """Write a column's commit of any shard: one that was made once, with other names."""
    ref, attempt = ShardRef(source=SOURCE, unit="@unit", shard="0shard0"), "20261101T000000-00000000"
    base, table = f"{column}/{SOURCE}/{ref.shard}.{attempt}", column != IMAGES
    data = ObjectRef(name=f"{base}.parquet" if table else f"{base}.tar", size=1000, sha256="0" * 64)
    sidecar = data if table else ObjectRef(name=f"{base}.rows.parquet", size=1000, sha256="0" * 64)
    template = Commit(
        column=column,
        **ref.model_dump(),
        generation=0,
        attempt=attempt,
        object=data,
        sidecar=sidecar,
        counts={"in": 1, "out": 1, "failed": 0},
        reasons={},
        fingerprint=corpus.column(column).fingerprint,
        inputs=[],
        timings={"seconds": 1.0},
        host="made",
    ).to_bytes()
    return lambda ref: template.replace(b"@unit", ref.unit.encode()).replace(b"0shard0", ref.shard.encode())


def fill(corpus: Corpus, column: str, shards: Sequence[ShardRef], write: Callable[[str, bytes], None]) -> None:
    """Commit the shards of a column that are not committed, with `write(name, bytes)`."""
    made, there = commit_bytes(corpus, column), corpus.committed(column, SOURCE)
    for ref in shards:
        if (SOURCE, ref.shard) not in there:
            write(commit_name(column, SOURCE, ref.shard, 0), made(ref))


def fill_units(corpus: Corpus, shards: Sequence[ShardRef], write: Callable[[str, bytes], None]) -> None:
    for start in range(0, len(shards), UNIT_SHARDS):
        some = shards[start : start + UNIT_SHARDS]
        names, fingerprint = [ref.shard for ref in some], corpus.source(SOURCE).fingerprint
        unit = UnitCommit(source=SOURCE, unit=some[0].unit, inputs=len(some), shards=names, fingerprint=fingerprint)
        write(commit_name(UNITS, SOURCE, unit.unit, 0), canonical(unit.model_dump(mode="json")))


# -- what is measured, each in a process of its own --------------------------------------------------------------------
def memory() -> int:
    """Return the most memory that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6


def planned(url: str, shards: int) -> dict[str, Any]:
    """Make the plan, and ask and report all that a driver would."""
    began = time.perf_counter()
    plan = Plan(Corpus.open(url), {SOURCE: Made(shards).units()}, [Nothing()])
    seconds, left = time.perf_counter() - began, 0
    while job := plan.take(0):
        plan.committed(SOURCE, job.shard, COLUMN)
        plan.release(job)
        left += 1
    return {"seconds": round(seconds, 2), "left": left, "memory_mb": memory()}


def built(url: str, shards: int, commits: int) -> dict[str, Any]:
    """Run a real driver on the plan of all shards, until so many are made; the first tenth is for warming up."""
    seen: list[tuple[float, int]] = []

    def look(snapshot: Snapshot) -> None:
        for line in snapshot.lines:
            if line.name == Nothing.name:
                seen.append((time.perf_counter(), line.done))
                if line.done >= commits and len(seen) > 1 and seen[-2][1] < commits:
                    os.kill(os.getpid(), signal.SIGTERM)

    with suppress(Stopped):
        carry_out(Corpus.open(url), [Made(shards)], [Nothing()], no_ingest, progress=look)
    warm = [(when, done) for when, done in seen if commits // 10 <= done <= commits]
    rate = (warm[-1][1] - warm[0][1]) / (warm[-1][0] - warm[0][0])
    return {"commits_per_second": round(rate, 1), "memory_mb": memory()}


def no_ingest(*given: Any) -> Any:
    raise AssertionError("all units are read")


def asked(url: str) -> dict[str, Any]:
    """Run `status` as the command line gives it, with the start of Python."""
    began = time.perf_counter()
    command = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()", "status", url, "--json"]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = round(time.perf_counter() - began, 2)
    try:
        found = json.loads(said)
    except ValueError:
        raise RuntimeError(f"status --json says more than one JSON object: {said[:1000]!r}") from None
    return {"seconds": seconds, "done": found["columns"][COLUMN][SOURCE]["done"]}


def apart(task: str, *given: Any) -> dict[str, Any]:
    """Run one of the functions above in a fresh process, so that its memory is its own."""
    command = [sys.executable, __file__, "--task", task, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} ended with {done.returncode}: {done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


# -- the benchmark -----------------------------------------------------------------------------------------------------
def measure(folder: Path, shards: int, commits: int) -> dict[str, Any]:
    corpus, all_shards = new_corpus(str(folder), shards), refs(shards)

    for column in (IMAGES, COLUMN, UNITS):
        (folder / "commits" / column / SOURCE).mkdir(parents=True)

    def write(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)

    said("writing the images' commits")
    fill(corpus, IMAGES, all_shards, write)
    fill_units(corpus, all_shards, write)
    said("planning")
    plan = apart("planned", corpus.url, shards)
    said("building")
    os.sync()  # what was written for it is no part of it
    build = apart("built", corpus.url, shards, min(commits, shards // 2))
    fill(corpus, COLUMN, all_shards, write)
    said("resuming")
    resume = apart("planned", corpus.url, shards)
    said("status")
    first, second = asked(corpus.url), asked(corpus.url)
    assert (plan["left"], resume["left"], first["done"], second["done"]) == (shards, 0, shards, shards)
    return {
        "shards": shards,
        "plan_seconds": plan["seconds"],
        "plan_memory_mb": plan["memory_mb"],
        "driver_memory_mb": build["memory_mb"],
        "commits_per_second": build["commits_per_second"],
        "resume_seconds": resume["seconds"],
        "resume_memory_mb": resume["memory_mb"],
        "compaction_seconds": first["seconds"],
        "status_seconds": second["seconds"],
        "requests_per_1000_commits": requests_on_s3(min(shards, ON_S3)),
    }


def requests_on_s3(shards: int) -> float:
    """Count the listing requests of a driver that resumes, for each thousand commits (a last page counts as one)."""
    with serve() as server, FaultyS3(server, seed=0, rates={}) as proxy:
        os.environ.update(environment(proxy.url))
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        corpus, all_shards = new_corpus(f"s3://{BUCKET}/scale", shards), refs(shards)
        for column in (IMAGES, COLUMN):
            fill(corpus, column, all_shards, corpus.store.create)
        fill_units(corpus, all_shards, corpus.store.create)
        proxy.requests.clear()
        found = apart("planned", corpus.url, shards)
        assert found["left"] == 0
        pages = 2 * math.ceil(shards / 1000) + 1  # of the images, the stage's column and the units
        empty = 3  # what was set aside: of units, of the images, and of the column
        return round((proxy.requests["LIST"] - empty) / pages, 3)


def said(what: str) -> None:
    print(what, file=sys.stderr)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--commits", type=int, default=3000, help="that a real driver makes, to see how fast it is")
    parser.add_argument("--folder", help="a folder on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        tasks: dict[str, Callable[..., dict[str, Any]]] = {"planned": planned, "built": built}
        name, url, *numbers = options.task
        print(json.dumps(tasks[name](url, *map(int, numbers))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.shards, options.commits)
        print_figures(found, options.json)
        said("removing what was made")


if __name__ == "__main__":
    main()
