import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.base.json_lines import JsonLines, plain

CASES = Path(__file__).parents[2] / "data" / "cases" / "trainer"


def any_step(line: dict) -> bool:
    return isinstance(line.get("step"), int)


def steps(path: Path) -> list[int]:
    def refuse(name: str) -> None:
        pytest.fail(name)

    return [json.loads(line, parse_constant=refuse)["step"] for line in path.read_text().splitlines()]


def test_a_line_torn_by_a_full_disk_is_dropped_and_the_one_behind_it_stays(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.path.write_bytes((CASES / "torn-log.jsonl").read_bytes())
    whole = {line["step"]: line for line in parsed((CASES / "torn-log.jsonl").read_text())}
    lines.keep(any_step)
    found = steps(lines.path)
    assert found == sorted(found) and set(found) == {*whole, 7} and 6 not in found
    lines.keep(lambda line: any_step(line) and line["step"] <= 7)
    assert steps(lines.path) == [1, 2, 3, 4, 5, 7]


def parsed(text: str) -> Iterator[dict]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def test_a_log_torn_at_every_byte_keeps_every_other_line(tmp_path: Path) -> None:
    made = [{"step": n, "loss": 0.5 + n, "by": {"-1..0": None, "0..1": 0.25}, "what": 'ä{"x'} for n in (1, 2, 3)]
    texts = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in made]
    lines = JsonLines(tmp_path / "log.jsonl")
    for at in range(len(texts[1])):
        lines.path.write_bytes(texts[0] + texts[1][:at] + texts[2])  # and the next one came right behind it
        lines.keep(any_step)
        assert steps(lines.path) in ([1, 3], [1, 2, 3]), at
        assert steps(lines.path) == [1, 3] or at >= len(texts[1]) - 1
        lines.path.write_bytes(texts[0] + texts[1][:at])  # a kill
        assert lines.append(made[2]) is None
        lines.keep(any_step)
        assert steps(lines.path) == ([1, 2, 3] if at == len(texts[1]) - 1 else [1, 3]), at
        for junk in (b"\0" * at, b"\xff" * at, b'{"' * at):
            lines.path.write_bytes(texts[0] + junk + b"\n" + texts[2])
            lines.keep(any_step)
            assert steps(lines.path) == [1, 3]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.path.write_text('{"step": 1, "loss": NaN}\n')
    lines.keep(any_step)
    lines.append({"step": 2, "loss": float("inf"), "by": {"a": [float("nan"), 1.0]}})
    assert lines.path.read_text().splitlines() == [
        '{"step": 1, "loss": null}',
        '{"step": 2, "loss": null, "by": {"a": [null, 1.0]}}',
    ]


@given(st.recursive(st.none() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)))
def test_what_is_plain_is_json(value) -> None:
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)


@pytest.fixture
def room() -> Iterator:
    """The limit on a file's size stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size=limits[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_lines_wait_for_room_and_none_is_torn(tmp_path: Path, room) -> None:
    lines = JsonLines(tmp_path / "log.jsonl")
    for size in range(30):
        lines.path.unlink(missing_ok=True)
        assert lines.append({"step": 1}) is None
        room(len('{"step": 1}\n') + size)
        errors = [lines.append({"step": step}) for step in (2, 3, 4)]
        assert sum(error is None for error in errors) == min(size // len('{"step": 2}\n'), 3)
        assert steps(lines.path) == [1, 2, 3, 4][: 1 + size // 12]
        room()
        assert lines.append({"step": 5}) is None
        assert steps(lines.path) == [1, 2, 3, 4, 5]


def test_what_has_only_to_be_cut_off_needs_no_room(tmp_path: Path, room) -> None:
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    room(0)
    lines.keep(lambda line: line["step"] < 2)
    room()
    assert lines.path.read_text() == '{"step": 1}\n'
    lines.path.write_text(text := '{"st{"step": 1}\n')
    room(1)
    with pytest.raises(OSError, match="File too large"):
        lines.keep(any_step)
    room()
    assert lines.path.read_text() == text and len(list(tmp_path.iterdir())) == 1
