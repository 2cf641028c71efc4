"""What is told of a build, on the terminal and to Ray's dashboard: the same figures."""

from collections import Counter
from pathlib import Path

import pytest

from microdit.pipeline.base.progress import Snapshot
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.engine import metrics
from microdit.pipeline.engine.board import Board
from microdit.pipeline.engine.messages import ShardWork
from microdit.pipeline.engine.plan import Job, Plan
from microdit.pipeline.stages.stage import UnitTask
from tests.pipeline.helpers.fake_stages import Pictures, ingest, open_corpus, source_words, upper_words


def test_the_board_and_the_metrics_tell_what_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: Counter[tuple[str, str]] = Counter()

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
            assert description and tag_keys == ("stage",)
            self.name = name

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0  # Ray refuses others
            told[self.name, tags["stage"]] += value  # type: ignore[assignment]

        def set(self, value: float, tags: dict[str, str]) -> None:
            told[self.name, tags["stage"]] = value  # type: ignore[assignment]

    monkeypatch.setattr(metrics, "Counter", Recorder)
    monkeypatch.setattr(metrics, "Gauge", Recorder)
    source, stages = Pictures(count=2), [source_words(), upper_words()]
    corpus = open_corpus(tmp_path / "corpus", [source], stages)
    ingested: list[Commit] = []
    ingest(corpus, source, UnitTask("pictures-000000"), ingested.append)
    plan = Plan(corpus, {source.name: source.units()}, stages)
    seen: list[Snapshot] = []
    board = Board([stage.name for stage in stages], seen.append)
    for commit in ingested:
        board.begin(plan.units[0])
        board.ingested(ShardWork.of(commit))
    board.unit_read()
    job = plan.take(0)
    assert job is not None
    board.begin(job)
    work = ShardWork(inputs=3, failed=1, bytes=4000, seconds=2.0)
    board.written(job, {"captions/source": work})
    board.written(Job(1, job.source, job.shard, {}), dict.fromkeys(("captions/upper", "captions/lower"), work))
    board.written(Job(1, job.source, job.shard, {}), {})  # another build was faster
    plan.committed(job.source, job.shard, "captions/source")
    board.note("by the way")
    board.show(plan, [job, None], loading={1}, holding=[1, 1])

    (shot,) = seen
    assert shot.notes == ["by the way"]
    lines = {line.name: line for line in shot.lines}
    assert (lines["ingest"].samples, lines["ingest"].failed, lines["ingest"].total) == (6, 2, 2)
    assert (lines["source words"].done, lines["source words"].running, lines["source words"].samples) == (1, 1, 3)
    assert (lines["upper words"].workers, lines["upper words"].state) == (2, "loading its model")
    assert lines["source words"].workers == 0 and lines["source words"].busy is None
    for name, line in lines.items():
        assert told["microdit_samples", name] == line.samples
        assert told["microdit_failed_samples", name] == line.failed
        assert told["microdit_left", name] == line.total - line.done
    assert told["microdit_bytes", "upper words"] == 8000
    assert (told["microdit_shards", "upper words"], told["microdit_shards", "ingest"]) == (1, 2)
    assert {column: (did.shards, did.samples) for column, did in board.work.items()} == {
        "images": (2, 6), "captions/source": (1, 3), "captions/upper": (1, 3), "captions/lower": (1, 3),
    }  # fmt: skip
