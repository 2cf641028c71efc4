"""Measure the engine's overhead on a shard that takes a second: with Ray against the bare stage function.

    python benchmarks/overhead.py [--shards 30] [--seconds 1.0] [--rounds 2] [--json]

On a warm cluster of one CPU on this machine, for a stage that runs as tasks (several at once there) and one that runs
in an actor. A shard's time with the engine: from the first wave of commits to the last commit, times the shards that
are worked on at once, over the number of commits between; so no start of a process is in it. The stage sleeps, so that
what else the machine does counts less. Bare and with the engine in turns; medians. Goal: at most 1.05.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.engine.build import carry_out
from microdit.pipeline.engine.layout import Layout
from microdit.pipeline.stages.stage import Task, UnitTask
from tests.pipeline.helpers.fake_stages import Pictures, Words, ingest, open_corpus, spec

COLUMN = "captions/slept"
CPUS, WARM = 1, 24  # shards before the first round: all workers have started then


def stage(device: str | None, seconds: float) -> Words:
    return Words("slept", {COLUMN: spec("images")}, device=device, seconds=seconds)


def corpus_of(folder: Path, shards: int, made: Words) -> tuple[Corpus, Any]:
    """Make a corpus whose images are there."""
    source = Pictures(count=shards, shards=1)
    corpus = open_corpus(folder, [source], [made])
    for unit in source.units():
        ingest(corpus, source, UnitTask(unit), lambda message: None)
    return corpus, source


def bare(folder: Path, shards: int, made: Words) -> float:
    """Measure the seconds a shard by the plain function."""
    corpus, source = corpus_of(folder, shards, made)
    began = time.perf_counter()
    for unit in source.units():
        made.run(corpus, Task(ShardRef(source=source.name, unit=unit, shard=f"{unit}-00"), {COLUMN: 0}))
    return (time.perf_counter() - began) / shards


def engine(folder: Path, shards: int, made: Words) -> float:
    """Measure the seconds a shard by the engine, as if there were one worker."""
    corpus, source = corpus_of(folder, shards, made)
    carry_out(corpus, [source], [made], cast(Any, ingest))
    layout = Layout.for_cluster(CPUS, 0, 1)
    at_once = layout.models(made.device).count if made.device else int(CPUS / layout.task_cpu)
    times = sorted(item.modified.timestamp() for item in corpus.store.list(f"commits/{COLUMN}"))
    assert len(times) == shards > at_once
    return (times[-1] - times[at_once - 1]) * at_once / (shards - at_once)


def measure(shards: int, seconds: float, rounds: int) -> dict[str, Any]:
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=CPUS, num_gpus=0, **quiet)
    found: dict[str, Any] = {"shards": shards, "seconds": seconds}
    with tempfile.TemporaryDirectory() as folder:
        for kind, device in (("task", None), ("actor", "gpu")):
            engine(Path(folder, f"{kind}-warm"), WARM, stage(device, seconds))
            times: dict[Callable[[Path, int, Words], float], list[float]] = {bare: [], engine: []}
            for number in range(rounds):
                for run, took in times.items():
                    took.append(run(Path(folder, f"{kind}-{run.__name__}-{number}"), shards, stage(device, seconds)))
            plain, built = (statistics.median(took) for took in times.values())
            found |= {
                f"{kind}_bare_seconds": round(plain, 4),
                f"{kind}_engine_seconds": round(built, 4),
                f"{kind}_ratio": round(built / plain, 4),
            }
    ray.shutdown()
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--shards", type=int, default=30, help="in each round")
    parser.add_argument("--seconds", type=float, default=1.0, help="that the stage takes for a shard")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found = measure(options.shards, options.seconds, options.rounds)
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
