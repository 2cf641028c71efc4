"""The engine on a real Ray cluster of one CPU, where a wrong layout would hang."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.progress import Snapshot
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import read_failure
from microdit.pipeline.engine import build as engine
from microdit.pipeline.engine import driver, retries
from microdit.pipeline.engine.build import carry_out
from microdit.pipeline.engine.driver import Driver
from microdit.pipeline.engine.summary import BuildSummary
from microdit.pipeline.upkeep.status import status
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.fake_stages import (
    ROWS,
    Pictures,
    Words,
    ingest,
    open_corpus,
    source_words,
    spec,
    upper_words,
)
from tests.pipeline.helpers.small_corpus import write_images

ROOT = Path(__file__).parents[3]
MADE = ("captions/source", "captions/upper", "captions/lower")


# a build in a process of its own: its folder, seconds a shard, units
PROGRAM = """
import sys
from pathlib import Path
from microdit.pipeline.base.signals import Stopped
from microdit.pipeline.engine.build import carry_out
from tests.pipeline.made import write_images
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
    ray.init(
        address="local",  # not the one that another test has started
        num_cpus=1,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 << 20,
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.2)


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
    runs = tmp_path / "runs"
    runs.mkdir()
    third = Words("third", {"captions/third": spec("captions/upper")}, device="cpu", loads=loads, runs=runs)
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
    loaded = {path.name.split("-")[0]: path.name.split("-")[1] for path in loads.iterdir()}
    assert sorted(loaded) == ["third", "upper words"] and len(list(loads.iterdir())) == 2
    ran = [path.name.split("-")[3] for path in runs.iterdir()]
    assert ran == 6 * [loaded["third"]]  # a model that stays on a CPU has an actor too
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


def test_a_sample_that_crashes_or_hangs_its_process_is_set_aside_alone(cluster: None, tmp_path: Path) -> None:
    """One in a task, two in an actor that has two shards in hand, of shards of which the rest is committed."""
    sources = [Pictures(count=2)]
    crash, hang, late = ("pictures-000000-01", 1), ("pictures-000001-00", 0), ("pictures-000001-01", 1)
    stages = [source_words(crashes=(crash,)), upper_words(hangs=(hang,), crashes=(late,), at_once=2)]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    notes: list[str] = []
    summary = carry_out(
        corpus, sources, stages, ingest, stall_timeout=6.0, progress=lambda shot: notes.extend(shot.notes)
    )
    check_adds_up(summary)
    assert summary.exit_status == 0  # no shard is set aside, and samples may fail
    assert (summary.columns["captions/source"].committed, summary.columns["captions/lower"].committed) == (4, 4)
    assert summary.columns["captions/source"].reasons == {"upstream": 4, "crash": 1}
    assert summary.columns["captions/upper"].reasons == {"upstream": 5, "stall": 1, "crash": 1}
    upper = "captions/upper"
    for column, (shard, row), reason in (
        ("captions/source", crash, "crash"),
        (upper, hang, "stall"),
        (upper, late, "crash"),
    ):
        lines = corpus.sidecar(corpus.commit(column, "pictures", shard, 0)).to_pylist()
        assert [line["reason"] for line in lines if line["reason"] != "upstream"].count(reason) == 1
        assert (lines[row]["status"], lines[row]["reason"]) == ("failed", reason)
    assert f"source words: {crash[0]} row {crash[1]} is set aside: crash" in notes
    assert f"upper words: {hang[0]} row {hang[1]} is set aside: stall" in notes
    assert f"upper words: {late[0]} row {late[1]} is set aside: crash" in notes
    assert verify(corpus).problems == []


def test_what_is_damaged_lost_or_stale_is_made_again_by_repair(cluster: None, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    sources, stages = [Pictures(count=2)], [source_words(), upper_words()]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    carry_out(corpus, sources, stages, ingest)
    shards = [commit.shard for commit in corpus.commits("images")]

    flipped = corpus.commit("captions/source", "pictures", shards[0], 0).object.name
    data = bytearray((tmp_path / "corpus" / flipped).read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (tmp_path / "corpus" / flipped).write_bytes(data)
    lost = corpus.commit("images", "pictures", shards[1], 0).object.name
    (tmp_path / "corpus" / lost).unlink()
    torn = f"commits/captions/upper/pictures/{shards[2]}.0.json"
    (tmp_path / "corpus" / torn).write_bytes(b'{"version":1')
    unit = "commits/units/pictures/pictures-000001.0.json"
    (tmp_path / "corpus" / unit).write_bytes(b"")
    gone = f"commits/images/pictures/{shards[3]}.0.json"
    (tmp_path / "corpus" / gone).unlink()
    named = {problem.what for problem in verify(corpus).problems}
    assert {flipped, lost, torn, unit} <= named
    assert any(shards[3] in what for what in named)

    trusting = carry_out(corpus, sources, stages, ingest, ["captions/source"])
    assert not trusting.worked  # it trusts the commits, but says which it cannot understand
    assert any(torn in text for text in trusting.damage) and torn in trusting.text() and trusting.exit_status == 1
    notes: list[str] = []
    repaired = carry_out(corpus, sources, stages, ingest, repair=True, progress=lambda shot: notes.extend(shot.notes))
    assert repaired.exit_status == 0
    assert verify(corpus).problems == []
    assert f"repair: captions/source/pictures/{shards[0]} is made again" in notes
    generations = {column: corpus.committed(column) for column in ("images", *MADE)}
    assert [generations["images"]["pictures", shard] for shard in shards] == [0, 1, 0, 0]
    assert [generations["captions/source"]["pictures", shard] for shard in shards] == [1, 1, 0, 1]
    assert [generations["captions/upper"]["pictures", shard] for shard in shards] == [1, 1, 1, 1]
    assert [generations["captions/lower"]["pictures", shard] for shard in shards] == [1, 1, 0, 1]
    assert not carry_out(corpus, sources, stages, ingest, repair=True).worked


def test_a_rebuilt_input_makes_stale_what_comes_from_it(cluster: None, tmp_path: Path) -> None:
    sources, stages = [Pictures(count=1)], [source_words(), upper_words()]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    carry_out(corpus, sources, stages, ingest)
    ref = corpus.commits("images")[0].ref
    write_images(corpus, ref, rows=ROWS, generation=1, quality=50)
    found = status(corpus).columns
    assert [found[column]["pictures"].stale for column in ("images", *MADE)] == [0, 1, 0, 0]
    carry_out(corpus, sources, stages, ingest, repair=True)
    found = status(corpus).columns
    assert [found[column]["pictures"].stale for column in ("images", *MADE)] == [0, 0, 0, 0]
    assert verify(corpus).problems == []
    assert corpus.committed("captions/lower")["pictures", ref.shard] == 1


def test_a_node_that_does_not_see_the_folder_ends_the_build(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, stages = [Pictures(count=1)], [source_words()]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    monkeypatch.setattr(engine, "_probe", lambda corpus: nullcontext("probes/on-another-disk"))
    with pytest.raises(RequestError, match=r"does not see this folder.*s3://bucket/prefix"):
        carry_out(corpus, sources, stages, ingest)
    assert corpus.committed("images") == {}
    monkeypatch.setattr(Driver, "check_nodes", lambda driver: None)  # and one that joins later
    with pytest.raises(RequestError, match="does not see this folder"):
        carry_out(corpus, sources, stages, ingest)
    assert corpus.committed("images") == {}
    assert not list((tmp_path / "corpus").glob("failures/*"))


def test_a_model_that_cannot_load_ends_the_build_with_one_message(cluster: None, tmp_path: Path) -> None:
    sources, stages = [Pictures()], [source_words(), upper_words(load_error="weights.safetensors is not there")]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    with pytest.raises(RequestError, match=r"stage upper words.*weights\.safetensors is not there"):
        carry_out(corpus, sources, stages, ingest)
    assert not (tmp_path / "corpus/failures").exists()


def test_a_disk_too_full_to_say_what_failed_ends_the_build(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(driver, "write_failure", full)
    sources, stages = [Pictures(count=1)], [source_words(broken=("pictures-000000-01",))]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    with pytest.raises(RequestError, match=r"No space left on device.*no words for pictures-000000-01.*Make room"):
        carry_out(corpus, sources, stages, ingest, max_attempts=1)


def test_a_disk_of_a_worker_that_stays_full_ends_the_build(cluster: None, tmp_path: Path) -> None:
    sources, stages = [Pictures(count=2)], [source_words(full=("pictures-000000-01",))]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    with pytest.raises(
        RequestError, match=r"node \S+: OSError.*No space left.*pictures-000000-01.*2 attempts.*Make room"
    ):
        carry_out(corpus, sources, stages, ingest, max_attempts=2)
    assert not (tmp_path / "corpus/failures").exists()  # nothing is set aside for it
    going_on = carry_out(corpus, sources, [source_words()], ingest)
    assert going_on.columns["captions/source"].committed == 4


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


STOPPED = 30  # seconds after a signal in which a build ends, whatever is in flight


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_the_shards_in_flight_end(number: signal.Signals, tmp_path: Path) -> None:
    url = tmp_path / "corpus"
    process = start(url, seconds=0.2, count=20)
    try:
        wait_for_commits(process, url, "captions/source", 3)
        process.send_signal(number)
        said = process.communicate(timeout=STOPPED)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert said.strip() == f"stopped by {number.name}; run the same command again and it goes on"
    assert len(commits(url, "captions/source")) < 40  # it came in the middle
    assert not list((url / "captions").rglob("*#*"))  # the shards in flight came to their end


@pytest.mark.slow
def test_a_signal_drops_the_shards_that_take_too_long(tmp_path: Path) -> None:
    url = tmp_path / "corpus"
    process = start(url, seconds=600, count=2)
    try:
        wait_for_commits(process, url, "images", 4)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=STOPPED)[0]
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert "stopped by SIGTERM" in said
    assert not commits(url, "captions/source")
    corpus = Corpus.open(url)
    assert verify(corpus).problems == []  # what was dropped does not exist for a reader
