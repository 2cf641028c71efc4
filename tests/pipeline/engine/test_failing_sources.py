"""A source that fails wholesale is paused, tried again, and left unread if it does not recover."""

import time
from pathlib import Path

import pytest

from microdit.pipeline.base.progress import Snapshot
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.engine import failing_sources
from microdit.pipeline.engine.build import build
from microdit.pipeline.engine.failing_sources import FailingSources
from microdit.pipeline.engine.messages import ShardWork
from tests.pipeline.engine.test_failed_rows import PICTURES, config_of
from tests.servers.pictures import PictureServer


def work(inputs: int, **reasons: int) -> ShardWork:
    return ShardWork(inputs, sum(reasons.values()), 0, 0.0, reasons=reasons)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def test_a_source_that_is_gone_is_paused_and_then_left(now: list[float]) -> None:
    failing = FailingSources(0.1)
    assert failing.add("web", work(60, timeout=60)) is None  # too few to tell
    note = failing.add("web", work(60, connection=58))
    assert note == (
        "source web: 118 of the last 120 inputs failed (timeout 60, connection 58): it is not read for 60 s, then one "
        "unit is tried"
    )
    assert not failing.may_read("web", 0) and failing.may_read("other", 9) and not failing.left
    assert failing.add("web", work(60, connection=60)) is None  # a unit that was being read
    for pause in (60, 120, 240):
        now[0] += pause - 1
        assert not failing.may_read("web", 0)
        now[0] += 1
        assert failing.may_read("web", 0) and not failing.may_read("web", 1)
        said = failing.add("web", work(20, connection=20))
        assert said is not None and ("left unread" in said) == (pause == 240)
    assert failing.left == ["web"] and not failing.may_read("web", 0)


def test_a_source_that_answers_again_is_read_on(now: list[float]) -> None:
    failing = FailingSources(0.1)
    failing.add("web", work(200, http_503=200))
    now[0] += 60
    assert failing.add("web", work(20, http_503=2)) == "source web: it answers again, and is read on"
    assert failing.may_read("web", 9)
    said = failing.add("web", work(20))
    assert said == "source web: 84.2% of 240 inputs have failed so far, the config allows max_failures = 0.1"
    assert failing.add("web", work(20, http_404=20)) is None  # it is said once


def test_pictures_that_are_too_small_are_no_reason_to_wait(now: list[float]) -> None:
    failing = FailingSources(1.0)
    assert failing.add("web", work(2000, too_small=1990)) is None
    assert failing.may_read("web", 3)


def test_a_build_leaves_unread_what_would_fail(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failing_sources, "LEAST", 10)
    monkeypatch.setattr(failing_sources, "PAUSE", 0.1)
    server = PictureServer()  # it is not there
    config = config_of(tmp_path, server, {}, unit_inputs=10, timeout=2)
    notes: list[str] = []

    def listen(snapshot: Snapshot) -> None:
        notes.extend(snapshot.notes)

    summary = build(config, progress=listen)
    assert summary.left == ["web"] and summary.exit_status == 1
    assert summary.units.read == 4 < summary.units.total == 6
    assert "source web: nearly all of its inputs failed, and its other units are left unread" in summary.text()
    assert sum("then one unit is tried" in note for note in notes) == 3

    with server:
        summary = build(config, retry_failed=True)
    assert (summary.exit_status, summary.left) == (0, [])
    assert summary.columns["images"].out == PICTURES == summary.columns["images"].inputs
    assert len(Corpus.open(config.corpus).units("web")) == 6 + 4
