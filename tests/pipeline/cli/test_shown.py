"""Tables that commands print."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.base.terminal import printable
from microdit.pipeline.cli.app import app
from microdit.pipeline.cli.shown import print_rows


@pytest.mark.parametrize(("columns", "widest"), [("40", 40), ("", 400), ("wide", 400)])
def test_tables_are_as_narrow_as_columns_says(
    columns: str, widest: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_rows(["id", "caption"], [{"id": 1, "caption": "word " * 60}])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= widest and sum(line.count("word") for line in lines) == 60
    assert len(lines) == 2 or widest == 40


HOSTILE = "red\x1b[2J\x9b31m\rapple \u202egnp\u2066.\x7f"
SHOWN = r"red\x1b[2J\x9b31m\x0dapple \u202egnp\u2066.\x7f"


def test_control_characters_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(["caption", HOSTILE], [{"caption": HOSTILE, HOSTILE: {"a": [HOSTILE]}}])
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 2 and not set("\x1b\x9b\r\u202e\u2066\x7f") & set(out)


def test_control_characters_of_a_message_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        app(["status", f"no/such/{HOSTILE}"])
    err = capsys.readouterr().err
    assert SHOWN in err and not set("\x1b\x9b\r\u202e") & set(err)


@given(st.text())
def test_only_control_characters_are_escaped(text: str) -> None:
    assert not any(map(_controls, printable(text)))
    assert any(map(_controls, text)) or printable(text) == text


def _controls(character: str) -> bool:
    turns = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    if unicodedata.bidirectional(character) in turns or character in "\u061c\u200e\u200f":
        return True
    return unicodedata.category(character) == "Cc" and character not in "\t\n"
