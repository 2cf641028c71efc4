"""Commits a second on a local folder, beside what the disk gives for bare files, in one run.

    python benchmarks/commits.py [--folder DIR] [--seconds 2] [--rounds 3] [--writers 2] [--json]

Bare: create a file of the size of a commit, fsync it, fsync its folder. Record: `Store.create` of a commit's bytes (the
same and a link, so that nothing is overwritten). Shard: a whole attempt of a column of one scalar with 8 rows: sidecar,
checksum, commit, two objects. All three in turns, in several rounds, by the same number of processes; medians.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.harness import argument_parser
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.storage.store import open_store

ROWS, RECORD = 8, b"x" * 1000


def bare(folder: Path) -> Iterator[None]:
    folder = folder / uuid.uuid4().hex
    folder.mkdir()
    while True:
        with (folder / uuid.uuid4().hex).open("wb") as file:
            file.write(RECORD)
            file.flush()
            os.fsync(file.fileno())
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        yield


def record(folder: Path) -> Iterator[None]:
    store, source = open_store(folder), uuid.uuid4().hex
    while True:
        store.create(f"commits/scores/bench/{source}/{uuid.uuid4().hex}.0.json", RECORD)
        yield


def shard(folder: Path) -> Iterator[None]:
    corpus, unit, number = Corpus.open(folder / "corpus"), unit_name("bench", int(uuid.uuid4()) % 10**9), 0
    while True:
        ref, number = ShardRef(source="bench", unit=unit, shard=shard_name(unit, number)), number + 1
        with begin_attempt(corpus, "scores/bench", ref) as attempt:
            for row in range(ROWS):
                attempt.add(row, f"{ref.shard}-{row}", x=0.5)
            attempt.commit()
        yield


WORK: dict[str, Callable[[Path], Iterator[None]]] = {"bare": bare, "record": record, "shard": shard}


def count(name: str, folder: Path, seconds: float) -> float:
    """Count the operations of one kind that a process does in a second."""
    work, done = WORK[name](folder), 0
    next(work)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(work)
        done += 1
    return done / (time.perf_counter() - began)


def measure(folder: Path, seconds: float, rounds: int, writers: int) -> dict[str, float | int]:
    corpus = Corpus.create(folder / "corpus", "bench")
    corpus.declare_source("bench", {})
    corpus.declare_column("scores/bench", {}, {"x": "float32"})
    rates: dict[str, list[float]] = {name: [] for name in WORK}
    with ProcessPoolExecutor(writers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in range(rounds):
            for name in WORK:
                jobs = [pool.submit(count, name, folder, seconds) for _ in range(writers)]
                rates[name].append(sum(job.result() for job in jobs))
    files, records, shards = (round(statistics.median(rates[name]), 1) for name in WORK)
    return {
        "writers": writers,
        "files_per_second": files,
        "records_per_second": records,
        "shards_per_second": shards,
        "records_per_file": round(records / files, 3),
        "shards_per_file": round(shards / files, 3),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", help="a folder on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each kind in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--writers", type=int, default=2, help="processes that write at the same time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.seconds, options.rounds, options.writers)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{found['files_per_second']:8.1f} bare files a second, {found['writers']} processes")
    print(f"{found['records_per_second']:8.1f} records a second, {found['records_per_file']:.2f} of bare files")
    print(f"{found['shards_per_second']:8.1f} whole shards a second (two objects each)")


if __name__ == "__main__":
    main()
