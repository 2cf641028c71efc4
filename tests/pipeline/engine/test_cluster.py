"""The engine on a Ray cluster of three nodes with the corpus on S3, of which something is killed in the middle."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.engine.actors import PER_ACTOR
from microdit.pipeline.engine.layout import Layout
from microdit.pipeline.stages.stage import UnitTask
from microdit.pipeline.upkeep.gc import gc
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.fake_driver import sources_and_stages
from tests.pipeline.helpers.fake_stages import ROWS, ingest, open_corpus
from tests.pipeline.helpers.small_corpus import Hashes, hashes, named_objects
from tests.pipeline.helpers.stub_torch import write_torch

Process = subprocess.Popen[str]
ROOT = Path(__file__).parents[3]
COLUMNS = ("images", "captions/source", "captions/upper", "captions/lower")
UNITS, SHARDS = 8, 16
NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 << 20}
LAYOUT = Layout.for_cluster(3, 0, 1)


# shards that may be worked on at one moment: a task for each CPU, what each actor has, and what ingest writes
IN_FLIGHT = LAYOUT.tasks + LAYOUT.gpu_models.count * PER_ACTOR
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def cluster(s3_server: str) -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    cluster.add_node(**NODE)
    cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Hashes:
    """The same corpus, made without Ray."""
    sources, stages = sources_and_stages(None, 0.0, UNITS)
    corpus = open_corpus(tmp_path_factory.mktemp("undisturbed") / "corpus", sources, stages)
    for unit in sources[0].units():
        ingest(corpus, sources[0], UnitTask(unit), lambda message: None)
    for stage in stages:
        for commit in corpus.commits("images"):
            stage.write(corpus, commit.ref, *stage.columns)
    return hashes(corpus, COLUMNS)


@contextmanager
def build(
    cluster: Cluster, url: str, logs: Path, seconds: float = 0.3, units: int = UNITS, gpus: int = 0, gate: str = ""
) -> Iterator[Process]:
    command = [
        sys.executable,
        "-m",
        "tests.pipeline.helpers.fake_driver",
        url,
        str(logs),
        str(seconds),
        str(units),
        str(gpus),
    ]
    command += [gate] if gate else []
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def answer(process: Process) -> dict[str, Any]:
    said = process.communicate(timeout=500)[0]
    assert process.returncode == 0, said
    return json.loads(said.splitlines()[-1])


def wait_for(process: Process, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, "the build ended before the fault"
        assert time.monotonic() < until, "the build did not get that far"
        time.sleep(0.05)


def begun(logs: Path, stage: str = "pictures") -> list[str]:
    """What was begun (of a stage's name: loaded), as `<name>-<process>-<its parent>-<random>`."""
    return [path.name for path in logs.iterdir() if path.name.startswith(stage)]


def check_whole(corpus: Corpus, logs: Path, undisturbed: Hashes, may_redo: int) -> None:
    """Nothing is lost, nothing is there twice, the bytes are those of an undisturbed build, little was done again."""
    assert verify(corpus).problems == []
    assert hashes(corpus, COLUMNS) == undisturbed
    for column in COLUMNS:
        found = corpus.commits(column)
        assert len(found) == SHARDS and {commit.generation for commit in found} == {0}
        assert sum(commit.counts["in"] for commit in found) == SHARDS * ROWS
    assert len(begun(logs)) <= 2 * SHARDS + may_redo  # two stages
    gc(corpus, older_than_hours=0)
    assert {item.name for column in COLUMNS for item in corpus.store.list(column)} == named_objects(corpus, COLUMNS)
    assert verify(corpus).problems == []


def test_the_driver_is_killed(cluster: Cluster, s3_url: str, logs: Path, undisturbed: Hashes) -> None:
    seed = random.randrange(2**32)
    number = random.Random(seed).randint(2, SHARDS - 4)
    print(f"seed {seed}: after {number} shards")
    with build(cluster, s3_url, logs) as process:
        wait_for(process, lambda: len(begun(logs)) >= number)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert len(Corpus.open(s3_url).committed("captions/lower")) < SHARDS  # it came in the middle
    with build(cluster, s3_url, logs, seconds=0.0) as process:
        again = answer(process)
    assert again["worked"]
    check_whole(Corpus.open(s3_url), logs, undisturbed, IN_FLIGHT)
    with build(cluster, s3_url, logs) as process:  # and then there is nothing to do, not even to start Ray
        third = answer(process)
    assert (third["worked"], third["ray"]) == (False, False)


def test_an_actor_is_killed(cluster: Cluster, s3_url: str, logs: Path, undisturbed: Hashes) -> None:
    with build(cluster, s3_url, logs) as process:
        wait_for(process, lambda: bool(begun(logs, "upper words")))
        actor = int(begun(logs, "upper words")[0].split("-")[1])
        wait_for(process, lambda: any(int(name.split("-")[-3]) == actor for name in begun(logs)))
        os.kill(actor, signal.SIGKILL)
        summary = answer(process)
    assert len(begun(logs, "upper words")) >= 2  # the fault fired: the model was loaded again
    assert summary["columns"]["captions/upper"]["built"] == SHARDS
    check_whole(Corpus.open(s3_url), logs, undisturbed, PER_ACTOR)


def test_a_node_is_killed_and_another_one_joins(cluster: Cluster, s3_url: str, logs: Path, undisturbed: Hashes) -> None:
    with build(cluster, s3_url, logs) as process:
        parents = {int(node.all_processes["raylet"][0].process.pid): node for node in cluster.worker_nodes}
        wait_for(process, lambda: any(int(name.split("-")[-2]) in parents for name in begun(logs)))
        doomed = next(int(name.split("-")[-2]) for name in begun(logs) if int(name.split("-")[-2]) in parents)
        there = len(begun(logs))
        cluster.remove_node(parents[doomed], allow_graceful=False)
        fresh = cluster.add_node(**NODE).all_processes["raylet"][0].process.pid
        summary = answer(process)
    assert summary["set_aside"] == []
    assert there < len(begun(logs))  # it came in the middle
    assert any(int(name.split("-")[-2]) == fresh for name in begun(logs)), "the node that joined was not used"
    check_whole(Corpus.open(s3_url), logs, undisturbed, IN_FLIGHT)


@pytest.mark.slow
def test_two_builds_share_the_work(cluster: Cluster, s3_url: str, logs: Path, undisturbed: Hashes) -> None:
    gate = str(logs.parent / "gate")
    with build(cluster, s3_url, logs, gate=gate) as one, build(cluster, s3_url, logs, gate=gate) as two:
        wait_for(one, lambda: len(begun(logs, "ready")) == 2)
        Path(gate).touch()
        found = [answer(process) for process in (one, two)]
    built = {column: [summary["columns"][column]["built"] for summary in found] for column in COLUMNS}
    print(built)
    assert all(sum(counts) == SHARDS for counts in built.values())
    assert min(sum(counts[i] for counts in built.values()) for i in (0, 1)) > 0  # each did something
    check_whole(Corpus.open(s3_url), logs, undisturbed, 2 * IN_FLIGHT)


def test_a_model_waits_for_the_gpu_that_is_to_come(cluster: Cluster, s3_url: str, logs: Path, tmp_path: Path) -> None:
    """Its actor is the demand that an autoscaler sees, and starts on the node that joins."""
    with build(cluster, s3_url, logs, seconds=0.0, units=1, gpus=1) as process:
        wait_for(process, lambda: len(begun(logs)) == 2)  # what needs no model goes on meanwhile
        time.sleep(1.0)
        assert begun(logs, "upper words") == []
        node = cluster.add_node(**NODE | {"num_gpus": 1, "env_vars": write_torch(tmp_path)})
        summary = answer(process)
    assert summary["columns"]["captions/upper"]["built"] == 2
    assert [int(name.split("-")[2]) for name in begun(logs, "upper words")] == [
        node.all_processes["raylet"][0].process.pid
    ]
    cluster.remove_node(node)
