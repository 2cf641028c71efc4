"""What people see of a build: on a terminal, and elsewhere."""

import io
import json

import pytest
from rich.console import Console

from microdit.pipeline.base import progress
from microdit.pipeline.base.progress import Line, Rates, Snapshot, Tally, duration, number, shown

LINES = [
    Line(
        "ingest",
        "units",
        done=2,
        total=4,
        samples=1024,
        failed=30,
        rate=123.4,
        bytes_rate=2.5e6,
        left=61.0,
        state="2 at work",
    ),
    Line("latents:demo", "shards", done=3, total=8, more=True, aside=1, busy=0.634, state="1 set aside"),
    Line("captions/source", "shards", done=8, total=8, state="done"),
]


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120, color_system=None), out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0:00"), (61.9, "1:01"), (3599, "59:59"), (3600, "1 h 00 min"), (180000, "2 d 2 h")],
)
def test_durations_are_read_at_a_glance(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0, "0"), (0.25, "0.2"), (3.0, "3"), (12.6, "13"), (1918, "1,918")]
)
def test_numbers_are_read_at_a_glance(value: float | None, text: str) -> None:
    assert number(value) == text


def test_elsewhere_than_on_a_terminal_there_is_a_line_of_json_a_minute() -> None:
    where, out = console(terminal=False)
    with shown(where) as tell:
        tell(Snapshot(0.0, [], ["starting the workers"]))
        for seconds in (0.5, 1.0, 9.0, 59.9, 60.6, 112.0, 113.04):
            tell(Snapshot(seconds, LINES, ["a [note] as it is"] if seconds == 9.0 else []))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["note"] for line in lines if "note" in line] == ["starting the workers", "a [note] as it is"]
    told = [line for line in lines if "stages" in line]
    assert [line["seconds"] for line in told] == [0.5, 60.6, 113.0]  # and the last one, how it ended
    assert [stage["name"] for stage in told[0]["stages"]] == ["ingest", "latents:demo", "captions/source"]
    ingest = told[0]["stages"][0]
    assert {name: ingest[name] for name in ("done", "total", "failed", "rate", "bytes_rate", "busy", "left")} == {
        "done": 2, "total": 4, "failed": 30, "rate": 123.4, "bytes_rate": 2.5e6, "busy": None, "left": 61.0,
    }  # fmt: skip


def test_on_a_terminal_there_is_a_table_that_stays() -> None:
    where, out = console(terminal=True)
    with shown(where) as tell:
        tell(Snapshot(1.0, LINES, ["latents:demo: x-00 is set aside"]))
    text = out.getvalue()
    assert "latents:demo: x-00 is set aside" in text
    last = text[text.rindex("stage") :]
    assert [" ".join(line.split()) for line in last.splitlines()[1:4]] == [
        "ingest 2/4 units 1,024 30 123 2.5 1:01 2 at work",
        "latents:demo 3/8+ shards 0 63% 1 set aside",
        "captions/source 8/8 shards 0 done",
    ]


def test_rates_are_those_of_the_last_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    tally = Tally()
    assert tally.rates() == Rates()
    tally.begin()
    now = 110.0
    tally.add(jobs=2, samples=100, failed=1, size=4000, busy=5.0)
    assert tally.rates() == Rates(0.2, 10.0, 400.0, 0.5)
    now = 135.0
    tally.add(jobs=1, samples=50)
    assert tally.rates() == Rates(3 / 30, 150 / 30, 4000 / 30, 5 / 30)
    now = 141.0  # what was done at 110 is too old now
    assert tally.rates() == Rates(1 / 30, 50 / 30, 0.0, 0.0)
    assert (tally.jobs, tally.samples, tally.failed) == (3, 150, 1)
