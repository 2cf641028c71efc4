"""The demo's choice of drawings: at any speed, of any groups."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli import demo_plan
from microdit.pipeline.cli.demo_plan import (
    ALL,
    ENOUGH,
    LEAST,
    PLAIN_FIRST,
    VIEWS,
    choose,
    measure_speed,
    plan_training,
)
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.sources.openmoji.drawings import catalogue

NAMES = st.sampled_from([*PLAIN_FIRST, "country flag", "person role", "o'clock"])


@given(st.dictionaries(NAMES, st.integers(1, 300), min_size=1), st.floats(0.1, 5000), st.floats(60, 480))
def test_any_machine_gets_whole_groups_each_seen_often(groups: dict[str, int], speed: float, seconds: float) -> None:
    plan, total = choose(speed, seconds, groups), sum(groups.values())
    assert plan.drawings <= total and plan.drawings >= min(LEAST, total)
    assert plan.every == (plan.drawings == total) and plan.every == (plan.sql == ALL)
    assert plan.sql in plan.text() or plan.every
    if plan.drawings > LEAST + 300 and not plan.every:  # the last group may be too much
        assert plan.images / plan.drawings >= 0.5 * VIEWS
    faster = choose(2 * speed, seconds, groups)
    assert faster.drawings >= plan.drawings
    if speed * seconds >= ENOUGH * total + 1:
        assert plan.every


@pytest.mark.parametrize(
    ("speed", "low", "high"), [(1, 400, 440), (130, 400, 440), (170, 480, 570), (250, 700, 850), (600, 1845, 1925)]
)
def test_made_up_speeds_with_the_drawings_there_are(speed: float, low: int, high: int) -> None:
    groups: dict[str, int] = {}
    for drawing in catalogue():
        groups[drawing.group] = groups.get(drawing.group, 0) + 1
    assert set(PLAIN_FIRST) <= set(groups)
    plan = choose(speed, 340, groups)
    assert low <= plan.drawings <= high
    assert ("'food fruit'" in plan.sql) == (not plan.every) and "'country flag'" not in plan.sql
    assert f"{plan.drawings:,} drawings" in plan.text() and f"{speed:,} images/s" in plan.text()


def test_a_speed_is_measured() -> None:
    assert 0 < measure_speed(1, 1) < 100_000


def test_a_run_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_groups(corpus: Corpus) -> dict[str, int]:
        return {"food fruit": 450, "country flag": 5}

    monkeypatch.setattr(demo_plan, "measure_speed", lambda processes, threads: 1.0)
    monkeypatch.setattr(demo_plan, "count_groups", find_groups)
    corpus = Corpus.create(str(tmp_path / "corpus"), "demo", 4)
    first = plan_training(corpus, tmp_path / "run", 300, 1, 1)
    assert first.drawings == 450 and "IN ('food fruit')" in first.sql
    monkeypatch.setattr(demo_plan, "measure_speed", lambda processes, threads: 1e6)
    assert plan_training(corpus, tmp_path / "run", 300, 1, 1) == first
    assert plan_training(corpus, tmp_path / "other", 300, 1, 1).every
    (tmp_path / "run" / "plan.json").write_text(json.dumps({"drawings": 3}))
    with pytest.raises(RequestError, match=r"plan\.json is damaged"):
        plan_training(corpus, tmp_path / "run", 300, 1, 1)
