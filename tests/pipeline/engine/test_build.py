"""The engine on a real Ray cluster of one CPU, where a wrong layout would hang."""

import errno
import random
from contextlib import nullcontext
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.progress import Snapshot
from microdit.pipeline.corpus.failures import read_failure
from microdit.pipeline.engine import build as engine
from microdit.pipeline.engine import cluster as ray_cluster
from microdit.pipeline.engine import give_up, retries
from microdit.pipeline.engine.build import carry_out
from microdit.pipeline.engine.summary import UnitCounts
from microdit.pipeline.upkeep.status import status
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.build_checks import MADE, check_adds_up, check_whole
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


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.2)


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
    assert summary.units == UnitCounts(total=3, read=3, set_aside=0)
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
    assert summary.units == UnitCounts(total=4, read=3, set_aside=1)
    assert {(entry.column, entry.shard) for entry in summary.set_aside} == {
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
    assert [entry.shard for entry in retried.set_aside] == ["broken-000001"]
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
    monkeypatch.setattr(engine, "presence", lambda corpus: nullcontext("probes/on-another-disk"))
    with pytest.raises(RequestError, match=r"does not see this folder.*s3://bucket/prefix"):
        carry_out(corpus, sources, stages, ingest)
    assert corpus.committed("images") == {}
    monkeypatch.setattr(ray_cluster, "check_nodes", lambda context: None)  # and one that joins later
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

    monkeypatch.setattr(give_up, "write_failure", full)
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
