"""The engine on a real Ray cluster of one CPU, where a wrong layout would hang."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.corpus import Corpus
from pipeline.engine import BuildSummary, carry_out
from pipeline.errors import RequestError
from pipeline.failures import read_failure
from pipeline.progress import Snapshot
from tests.pipeline.parts import ROWS, Pictures, Words, ingest, open_corpus, source_words, spec, upper_words

ROOT = Path(__file__).parent.parent.parent
MADE = ("captions/source", "captions/upper", "captions/lower")

# a build in a process of its own: its folder, seconds a shard, units
PROGRAM = """
import sys
from pathlib import Path
from pipeline.engine import Stopped, carry_out
from tests.pipeline.parts import Pictures, ingest, open_corpus, source_words, upper_words
url, seconds, count = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
sources, stages = [Pictures(count=count)], [source_words(seconds=seconds), upper_words(seconds=seconds)]
try:
    summary = carry_out(open_corpus(url, sources, stages), sources, stages, ingest)
except Stopped as stopped:
    print(stopped)
    sys.exit(128 + stopped.signum)
print(summary.worked, "ray" in sys.modules)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    ray.init(
        num_cpus=1,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 << 20,
        runtime_env=environment,
    )
    yield
    ray.shutdown()


def start(url: Path, seconds: float, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, str(url), str(seconds), str(count)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def commits(url: Path, column: str) -> list[Path]:
    return [path for path in (url / "commits" / column).rglob("*.json") if path.is_file()]


def wait_for_commits(process: "subprocess.Popen[str]", url: Path, column: str, number: int) -> None:
    until = time.monotonic() + 280
    while len(commits(url, column)) < number:
        assert process.poll() is None, f"the build ended too early: {process.stdout and process.stdout.read()}"
        assert time.monotonic() < until, "the build did not get that far"
        time.sleep(0.02)


def check_whole(corpus: Corpus, shards: int) -> None:
    """Every column has every shard once, and in = out + failed."""
    for column in ("images", *MADE):
        found = corpus.commits(column)
        assert len(found) == shards
        assert {commit.generation for commit in found} == {0}
        for commit in found:
            assert commit.counts == {"in": ROWS, "out": ROWS - 1, "failed": 1}


def check_adds_up(summary: BuildSummary) -> None:
    for column in summary.columns.values():
        assert column.shards == column.committed + column.set_aside + column.waiting
        assert column.inputs == column.out + column.failed
        assert sum(column.reasons.values()) == column.failed


def test_a_whole_build_streams_and_loads_each_model_once(cluster: None, tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.mkdir()
    third = Words("third", {"captions/third": spec("captions/upper")}, device="gpu", loads=loads)
    sources = [Pictures(count=3, entered=tmp_path)]
    stages = [source_words(), upper_words(loads=loads), third]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    seen: list[Snapshot] = []
    summary = carry_out(corpus, sources, stages, ingest, progress=seen.append)

    check_whole(corpus, shards=6)
    check_adds_up(summary)
    assert summary.exit_status == 0
    assert summary.worked
    assert summary.units == {"total": 3, "read": 3, "set_aside": 0}
    assert summary.columns["captions/third"].out == 6 * (ROWS - 1)
    assert summary.columns["captions/third"].reasons == {"upstream": 6}
    assert summary.columns["captions/third"].own_failures == 0
    assert sorted(path.name.rpartition("-")[0] for path in loads.iterdir()) == ["third", "upper words"]
    assert not (tmp_path / "running").exists()  # the source was left when all was done

    assert any(line.name == "ingest" and line.state.endswith("at work") for shot in seen for line in shot.lines)
    last = {line.name: line for line in seen[-1].lines}
    assert list(last) == ["ingest", "source words", "upper words", "third"]
    assert all(line.done == line.total and not line.more for line in last.values())
    assert last["third"].samples == 6 * ROWS


def test_what_fails_is_set_aside_and_taken_again_when_asked(cluster: None, tmp_path: Path) -> None:
    healed = tmp_path / "healed"
    sources = [Pictures(count=2), Pictures("broken", count=2)]
    stages = [
        source_words(broken=("pictures-000000-01",), heals=healed),
        upper_words(deadly=("pictures-000001-00",), heals=healed),
    ]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    notes: list[str] = []

    def listen(snapshot: Snapshot) -> None:
        notes.extend(snapshot.notes)

    summary = carry_out(corpus, sources, stages, ingest, max_attempts=2, progress=listen)
    check_adds_up(summary)
    assert summary.exit_status == 1
    assert summary.units == {"total": 4, "read": 3, "set_aside": 1}
    assert {(entry["column"], entry["shard"]) for entry in summary.set_aside} == {
        ("units", "broken-000001"),
        ("captions/source", "pictures-000000-01"),
        ("captions/upper", "pictures-000001-00"),
        ("captions/lower", "pictures-000001-00"),
    }
    upper = summary.columns["captions/upper"]  # of six shards one died, and one has no captions
    assert (upper.committed, upper.set_aside, upper.waiting) == (4, 1, 1)
    failure = read_failure(corpus, "captions/source", "pictures", "pictures-000000-01", 0)
    assert failure.attempts == 2
    assert "no words for pictures-000000-01" in failure.traceback
    assert "raise ValueError" in failure.traceback
    assert "died" in read_failure(corpus, "captions/upper", "pictures", "pictures-000001-00", 0).message
    assert "disk is on fire" in read_failure(corpus, "units", "broken", "broken-000001", 0).message
    assert sum("set aside after 2 attempts" in note for note in notes) == 3

    again = carry_out(corpus, sources, stages, ingest)
    assert not again.worked
    assert again.exit_status == 1

    healed.touch()
    retried = carry_out(corpus, sources, stages, ingest, retry_failed=True, max_attempts=1)
    check_adds_up(retried)
    assert [entry["shard"] for entry in retried.set_aside] == ["broken-000001"]
    assert retried.columns["captions/source"].built == 1
    assert retried.columns["captions/upper"].built == 2
    assert (tmp_path / "corpus/failures/units/broken/broken-000001.1.json").is_file()


def test_a_model_that_cannot_load_ends_the_build_with_one_message(cluster: None, tmp_path: Path) -> None:
    sources, stages = [Pictures()], [source_words(), upper_words(load_error="weights.safetensors is not there")]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    with pytest.raises(RequestError, match=r"stage upper words.*weights\.safetensors is not there"):
        carry_out(corpus, sources, stages, ingest)
    assert not (tmp_path / "corpus/failures").exists()


def test_too_many_failed_samples_are_exit_status_1(cluster: None, tmp_path: Path) -> None:
    sources, stages = [Pictures(count=1)], [source_words()]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    summary = carry_out(corpus, sources, stages, ingest, max_failures=0.1)
    assert summary.too_many_failures == ["images"]  # a third fails at ingest; captions inherit it
    assert summary.exit_status == 1
    assert carry_out(corpus, sources, stages, ingest, max_failures=0.5).exit_status == 0


def test_columns_run_apart(cluster: None, tmp_path: Path) -> None:
    sources, stages = [Pictures(count=1)], [source_words(), upper_words()]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    first = carry_out(corpus, sources, stages, ingest, ["images"])
    assert list(first.columns) == ["images"]
    assert first.columns["images"].built == 2
    early = carry_out(corpus, sources, stages, ingest, ["captions/upper"])
    assert not early.worked
    assert early.columns["captions/upper"].waiting == 2
    both = carry_out(corpus, sources, stages, ingest, ["captions/source", "captions/upper"])
    assert both.columns["captions/upper"].built == 2
    assert corpus.committed("captions/lower") == {}


def test_killed_in_the_middle_it_goes_on_and_a_third_run_has_nothing_to_do(cluster: None, tmp_path: Path) -> None:
    url, shards = tmp_path / "corpus", 16
    process = start(url, seconds=0.2, count=shards // 2)
    try:
        wait_for_commits(process, url, "captions/upper", 3)
    finally:
        process.kill()
        process.wait()
    time.sleep(1.0)  # workers end within a tenth of a second
    before = {column: {path.name: path.read_bytes() for path in commits(url, column)} for column in MADE}
    assert 3 <= len(before["captions/upper"]) < shards  # the kill came in the middle
    time.sleep(1.0)
    assert all(len(commits(url, column)) == len(before[column]) for column in MADE), "a worker outlived its driver"

    sources, stages = [Pictures(count=shards // 2)], [source_words(), upper_words()]
    corpus = open_corpus(url, sources, stages)
    summary = carry_out(corpus, sources, stages, ingest)
    check_whole(corpus, shards)
    check_adds_up(summary)
    for column in MADE:
        assert summary.columns[column].built == shards - len(before[column])
        kept = {path.name: path.read_bytes() for path in commits(url, column)}
        assert before[column].items() <= kept.items()  # nothing was made twice

    with start(url, seconds=0, count=shards // 2) as third:
        said = third.communicate(timeout=60)[0]
    assert (third.returncode, said.split()) == (0, ["False", "False"])  # nothing done, ray not even imported


def test_sigterm_ends_cleanly(tmp_path: Path) -> None:
    url = tmp_path / "corpus"
    process = start(url, seconds=0.2, count=20)
    try:
        wait_for_commits(process, url, "captions/source", 3)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 143
    assert said.strip() == "stopped by SIGTERM; run the same command again and it goes on"
    assert len(commits(url, "captions/source")) < 40  # it came in the middle
    assert not list((url / "captions").rglob("*#*"))  # the shards in flight came to their end
