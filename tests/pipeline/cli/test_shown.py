"""Tables that commands print."""

import pytest

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
