"""Builds while everything goes wrong: random SIGKILLs, and a bucket with a bad day. Nothing is lost, nothing is twice.

    python benchmarks/chaos.py [--minutes 20] [--units 8] [--seed N] [--json]

Real builds (ingest, captions, scores, latents by the demo's autoencoder in an actor) by drivers that join a Ray
cluster of this machine, against moto's S3 server behind `tests/servers/faulty_s3.py`: 5% of the requests get 500 or
503, 2% a reset, 2% stall, of 2% each the upload and the answer are cut. Meanwhile drivers, workers and actors are
killed; a killed driver is started again until its build is done. Then `verify` reads it, and it is compared with the
same build made by plain functions in this process, undisturbed. Builds follow each other, each into its own prefix,
until the minutes are over; the last one is finished.

`lost`: samples that the undisturbed build has and a disturbed one has not. `twice`: samples that are there more often,
or shards that were committed again. `other_bytes`: shards whose data object differs. `redone_samples`: rows that stages
began to work on, more than there are. `gave_up`: drivers that ended by themselves before all was there, mostly because
the same shard was killed three times. Exit status 1 if anything is lost, twice or different, or `verify` finds fault.
"""

import argparse
import hashlib
import io
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import ray
from PIL import Image

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, unit_name
from microdit.pipeline.corpus.records import Commit, ShardRef, UnitCommit
from microdit.pipeline.engine.build import carry_out
from microdit.pipeline.sources.source import Input, Source
from microdit.pipeline.stages.ingest import SCALARS, ingest_stage, ingest_unit
from microdit.pipeline.stages.registry import stages_of
from microdit.pipeline.stages.stage import Task, UnitTask
from microdit.pipeline.upkeep.verify import verify
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3 import BUCKET, environment, serve

os.environ.setdefault("OMP_NUM_THREADS", "1")


os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # of the cluster, which nobody else reaches


UNIT_INPUTS, SHARD_SAMPLES = 48, 12
KILL_EVERY = 6.0  # seconds, on average, while there is something at work; a third of it in short runs
KILLS = {"worker": 4, "actor": 3, "driver": 1}
STALLS = (0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0)  # seconds, of as many stalls one each
DEAD = 90.0  # one more, longer than a store waits; not in short runs
SHORT = 5.0  # minutes
MOST_DRIVERS = 100  # for one build

CONFIG = {
    "name": "chaos",
    "corpus": "-",
    "shard_samples": SHARD_SAMPLES,
    "sources": {"made": {"adapter": "openmoji"}},  # `Made` stands for it
    "images": {"min_side": 32},
    "columns": {
        "captions/source": {},
        "scores/basic": {},
        "latents/demo-64": {"autoencoder": "demo", "resolution": 64},
    },
}


@dataclass
class Made:
    """A source of noise, the same every time; some inputs are missing, some are no images."""

    count: int
    log: Path
    name: str = "made"
    terms: str = "made for a benchmark"

    def stage(self) -> dict[str, Any]:
        return {"adapter": "made", "units": self.count}

    def units(self) -> list[str]:
        return [unit_name(self.name, number) for number in range(self.count)]

    def running(self, corpus: Corpus, say: Callable[[str], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        for ordinal in range(UNIT_INPUTS):
            key = f"{unit}-{ordinal:03d}"
            if not wanted(ordinal):
                yield Input(ordinal, key, None)
                continue
            begun(self.log, 1)
            seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
            if seed % 29 == 0:
                yield Input(ordinal, key, None, reason="http_404", detail="on purpose")
                continue
            pixels = np.random.default_rng(seed).integers(0, 255, (96, 96, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "jpeg", quality=80)
            data = buffer.getvalue() if seed % 31 else b"no image"
            yield Input(ordinal, key, data, origin=f"https://example.org/{key}.jpg", caption=f"noise {seed}")


class Counted:
    """A stage that tells when it begins with a shard."""

    def __init__(self, stage: Any, log: Path):
        self._stage, self._log = stage, log
        self.name, self.columns, self.device = stage.name, stage.columns, stage.device

    def load(self) -> None:
        self._stage.load()

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        begun(self._log, SHARD_SAMPLES if task.rows is None else len(task.rows))
        made: list[Commit] = self._stage.run(corpus, task)
        return made


def begun(log: Path, rows: int) -> None:
    with log.open("a") as file:
        file.write(f"{rows}\n")


def made_corpus(url: str, units: int, log: Path) -> tuple[Corpus, Made, list[Counted], BuildConfig]:
    """Make the corpus with everything declared, its source and its stages."""
    config = BuildConfig.model_validate(CONFIG)
    source, stages = Made(units, log), [Counted(stage, log) for stage in stages_of(config)]
    corpus = Corpus.create(url, config.name, config.shard_samples)
    corpus.declare_source(source.name, {**source.stage(), "images": ingest_stage(config.images)})
    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    for stage in stages:
        for column, spec in stage.columns.items():
            corpus.declare_column(column, spec.stage, spec.scalars)
    return corpus, source, stages, config


# -- the build that is disturbed, and the one that is not --------------------------------------------------------------
def drive(url: str, units: int, log: Path) -> int:
    """Run one driver's life: go on with the build; the exit status is 0 if all is there."""
    corpus, source, stages, config = made_corpus(url, units, log)

    def ingest(corpus: Corpus, source: Source, task: UnitTask, report: Callable[[Commit], None]) -> UnitCommit:
        return ingest_unit(corpus, source, task, config, report)

    summary = carry_out(corpus, [source], stages, ingest, retry_failed=True)
    return summary.exit_status


def undisturbed(url: Path, units: int) -> Corpus:
    """Build the same by plain functions, one after the other."""
    corpus, source, stages, config = made_corpus(str(url), units, Path(os.devnull))
    for unit in source.units():
        for shard in ingest_unit(corpus, source, UnitTask(unit), config).shards:
            for stage in stages:
                ref = ShardRef(source=source.name, unit=unit, shard=shard)
                stage.run(corpus, Task(ref, dict.fromkeys(stage.columns, 0)))
    return corpus


# -- what kills --------------------------------------------------------------------------------------------------------
def descendants(pid: int) -> dict[int, str]:
    """Return the processes that a process started, directly or not, and their command lines."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found, queue = {}, [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            queue.append(child)
    return found


@contextmanager
def cluster() -> Iterator[None]:
    """Start a Ray cluster in this process, which drivers join and outlives them; the environment names it."""
    slow = {"health_check_timeout_ms": 60_000, "health_check_failure_threshold": 20}  # a busy machine is no dead one
    ray.init(
        address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, _system_config=slow
    )
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        ray.shutdown()


def victims(driver: int) -> dict[str, list[int]]:
    """Find the driver and the processes of the cluster that work for it, by kind; Ray's own are none."""
    found: dict[str, list[int]] = {"driver": [driver], "worker": [], "actor": []}
    for pid, command in descendants(os.getpid()).items():
        if command.startswith(("ray::ingest", "ray::captions", "ray::scores")):
            found["worker"].append(pid)
        elif command.startswith("ray::StageActor"):
            found["actor"].append(pid)
    return found


class Disturbed:
    """Builds one corpus through the proxy while its processes are killed."""

    def __init__(self, url: str, units: int, log: Path, chance: random.Random, kills: Counter[str], kill_every: float):
        self.url, self.units, self.log = url, units, log
        self.chance, self.kills, self.kill_every = chance, kills, kill_every
        self.drivers = self.gave_up = 0

    def build(self, until: float) -> None:
        """Start the driver until the build is done; kill until the time `until` (monotonic), and each kind once.

        Raises:
            RuntimeError: so many drivers did not do it.
        """
        command = [sys.executable, __file__, "--drive", self.url, "--units", str(self.units), "--log", str(self.log)]
        while self.drivers < MOST_DRIVERS:
            self.drivers += 1
            with tempfile.TemporaryFile() as output:
                driver = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
                try:
                    self._disturb(driver, until)
                finally:
                    driver.kill()
                    status = driver.wait()
                output.seek(0)
                said = output.read().decode(errors="replace")
            if status == 0:
                return
            if status != -signal.SIGKILL:
                self.gave_up += 1
                print(f"the driver of {self.url} ended with {status}: {said[-3000:]}", file=sys.stderr)
        raise RuntimeError(f"{self.url}: {MOST_DRIVERS} drivers did not finish it; the last one said: {said[-3000:]}")

    def _disturb(self, driver: "subprocess.Popen[bytes]", until: float) -> None:
        """Kill one of the driver's processes now and then, until it has ended."""
        due = time.monotonic() + self.chance.expovariate(1 / self.kill_every)
        while driver.poll() is None:
            time.sleep(0.1)
            if time.monotonic() < due or (time.monotonic() > until and all(self.kills.values())):
                continue
            there = victims(driver.pid)
            if not there["worker"] and not there["actor"]:
                continue  # it is starting or ending
            kinds = [kind for kind in KILLS if there[kind] and not self.kills[kind]]
            kinds = kinds or [kind for kind in KILLS if there[kind]]
            kind = self.chance.choices(kinds, [KILLS[kind] for kind in kinds])[0]
            with suppress(ProcessLookupError):
                os.kill(self.chance.choice(there[kind]), signal.SIGKILL)
                self.kills[kind] += 1
            due = time.monotonic() + self.chance.expovariate(1 / self.kill_every)


# -- what is there afterwards ------------------------------------------------------------------------------------------
@dataclass
class Contents:
    """Contents of a corpus: how often each sample is ok in a column, and the data object of each shard by its hash."""

    samples: Counter[tuple[str, str]]
    objects: dict[tuple[str, str], str]
    rows: int
    again: int
    """Shards with more than one generation."""


def contents(corpus: Corpus) -> Contents:
    samples: Counter[tuple[str, str]] = Counter()
    objects: dict[tuple[str, str], str] = {}
    rows = again = 0
    for column in corpus.columns():
        for commit in corpus.commits(column):
            sidecar = corpus.sidecar(commit)
            rows += len(sidecar)
            again += commit.generation > 0
            objects[column, commit.shard] = commit.object.sha256
            lines = zip(sidecar["key"].to_pylist(), sidecar["status"].to_pylist(), strict=True)
            samples.update((column, key) for key, status in lines if status == "ok")
    return Contents(samples, objects, rows, again)


def run(minutes: float, units: int, seed: int) -> dict[str, Any]:
    """Build until the minutes are over; return the figures."""
    chance, kills, totals = random.Random(seed), Counter(dict.fromkeys(KILLS, 0)), Counter[str]()
    began = time.monotonic()
    stalls, kill_every = (STALLS, KILL_EVERY / 3) if minutes < SHORT else ((*STALLS, DEAD), KILL_EVERY)
    with tempfile.TemporaryDirectory(prefix="microdit-chaos-") as folder:
        wanted = contents(undisturbed(Path(folder, "undisturbed"), units))
        with serve() as server, FaultyS3(server, seed, stall_seconds=stalls) as proxy, ExitStack() as stack:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                del os.environ[name]
            os.environ.update(environment(server))
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            stack.enter_context(cluster())  # its workers inherit the environment
            while time.monotonic() - began < 60 * minutes or not all(kills.values()):
                url, log = f"s3://{BUCKET}/build-{totals['builds']}", Path(folder, f"{totals['builds']}.log")
                build = Disturbed(url, units, log, chance, kills, kill_every)
                build.build(began + 60 * minutes)
                found, checked = contents(Corpus.open(url)), verify(Corpus.open(url))
                for problem in checked.problems:
                    print(f"{url}: {problem}", file=sys.stderr)
                totals += Counter(
                    builds=1,
                    drivers=build.drivers,
                    gave_up=build.gave_up,
                    samples=found.rows,
                    redone_samples=sum(map(int, log.read_text().split())) - found.rows,
                    lost=(wanted.samples - found.samples).total(),
                    twice=(found.samples - wanted.samples).total() + found.again,
                    other_bytes=len(dict(wanted.objects.items() - found.objects.items())),
                    problems=len(checked.problems),
                )
                print(
                    f"{time.monotonic() - began:6.0f} s: {url} is done: {dict(totals)}, kills {dict(kills)}",
                    file=sys.stderr,
                )
    names = ("builds", "drivers", "samples", "redone_samples", "gave_up", "lost", "twice", "other_bytes", "problems")
    return {
        "seed": seed,
        "minutes": round((time.monotonic() - began) / 60, 2),
        **{name: totals[name] for name in names},
        "redone_share": round(totals["redone_samples"] / totals["samples"], 4),
        "kills": dict(kills),
        "requests": proxy.requests.total(),
        "faults": dict(sorted(proxy.faults.items())),
        "lost_answers": proxy.lost_answers,
        "retries": proxy.retries,
    }


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="no build is begun later")
    parser.add_argument("--units", type=int, default=8, help=f"of {UNIT_INPUTS} images each, in every build")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        return drive(options.drive, options.units, options.log)
    print(f"seed {options.seed}", file=sys.stderr)
    found = run(options.minutes, options.units, options.seed)
    print_figures(found, options.json)
    return 1 if found["lost"] or found["twice"] or found["other_bytes"] or found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
