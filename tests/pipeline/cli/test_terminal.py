"""Texts of strangers on a terminal: whatever command prints them, they are shown and obeyed by none."""

import io
import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from microdit.pipeline.base.progress import Line, Snapshot, shown
from microdit.pipeline.base.terminal import printable, printable_json
from microdit.pipeline.cli import demo
from microdit.pipeline.cli.app import app
from microdit.pipeline.cli.shown import print_garbage, print_rows, print_status
from microdit.pipeline.cli.shown_verify import print_verification
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import Failure, write_failure
from microdit.pipeline.engine.summary import BuildSummary, SetAside, UnitCounts
from microdit.pipeline.selection.broken_samples import BrokenSamples
from microdit.pipeline.upkeep.gc import Garbage
from microdit.pipeline.upkeep.problem import Problem
from microdit.pipeline.upkeep.status import CorpusStatus
from microdit.pipeline.upkeep.verify import Verification, VerifiedTotals
from microdit.trainer.monitoring.log import Log
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS, REF, SOURCE, UNIT, keys_of

PIECES = [
    "\x1b[2J", "\x1b[31mEVIL", "\x9b31m", "\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x07", "\x1b]8;;http://x\x1b\\",
    "\r", "\b\b\b", "\x07", "\x00", "\x7f", "\x85", "\u202e", "\u2066", "\u200f", "[red]", "[/]", "[link=http://x]",
    ":smile:", "word " * 60, "é", "\ud800",
]  # fmt: skip
HOSTILE = "".join(PIECES[:-1])
IN_NAMES = HOSTILE.replace("\x00", "").replace("/", "").replace("word " * 60, "")
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(), max_size=8).map("".join)
SHORT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def obeyed(text: str) -> set[str]:
    """The characters of a text that a terminal would obey."""
    turns = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return {
        c for c in text
        if unicodedata.bidirectional(c) in turns or c in "\u061c\u200e\u200f"
        or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n")
    }  # fmt: skip


def literal(text: str) -> str:
    """A text as it comes out, without white space, at which tables break lines."""
    return "".join(printable(text).split())


def check(text: str, out: str) -> None:
    assert not obeyed(out), ascii(out)
    assert literal(text) in "".join(out.split()), ascii(out)


@given(TEXTS)
@example(HOSTILE)
def test_json_is_the_same_when_it_is_read(text: str) -> None:
    written = printable_json({text: [text]})
    assert not obeyed(written) and json.loads(written) == {text: [text]}


@given(TEXTS)
@example(HOSTILE)
@SHORT
def test_what_is_printed_for_people(capsys: pytest.CaptureFixture[str], text: str) -> None:
    told = re.sub(r"[\t\n]", " ", text)  # in a table of one line
    print_rows(["a"], [{"a": told}])
    check(told, capsys.readouterr().out)
    print_rows(["a", text], [{"a": {text: [text]}, text: text}])
    check("", capsys.readouterr().out)
    print_verification(Verification("c", [Problem("stray", text, text)], VerifiedTotals(0, 0, 0, 0, 0, {})))
    check(text, capsys.readouterr().out)
    print_garbage(Garbage(False, 1, 0, 0, 0, 0, [text], 0, [text]))
    check(text, capsys.readouterr().out)
    demo._say(Console(highlight=False), text)
    check(text, capsys.readouterr().out)
    Console(highlight=False, emoji=False, width=1000).print(demo._as_table([told], [[told]]), markup=False)
    check(told, capsys.readouterr().out)
    told = text.partition("\n")[0]
    failure = Failure(
        column="a", source="s", shard="h", stage="s", attempts=1, message=text, traceback="", host="h", time=""
    )
    print_status(CorpusStatus(text, text, 4, {}, {}, [failure], {text: {text: 1}}))
    check(told, capsys.readouterr().out)
    summary = BuildSummary(
        text, 1.0, True, UnitCounts(1, 0, 1), {}, [SetAside("a", "s", "h", text)], [text], left=[text]
    )
    check(told, printable(summary.text()))


@given(TEXTS, st.booleans())
@example(HOSTILE, True)
@example(HOSTILE, False)
@SHORT
def test_progress(text: str, terminal: bool) -> None:
    file = io.StringIO()
    with shown(Console(file=file, force_terminal=terminal, width=100_000)) as draw:
        draw(Snapshot(0.0, [Line(text, "shards", state=text)], [text]))
    out = file.getvalue()
    if terminal:  # what rich writes itself is obeyed: colours, and what moves the cursor over the table
        out = re.sub(r"\x1b\[(?:\?25[hl]|2K|1A|0m|31m|2m)|\r", "", out)
        out = re.sub(r"\x1b\[\d+m", lambda found: "" if found[0] != "\x1b[31mEVIL" else found[0], out)
        check(text, out)
    else:
        assert not obeyed(out) and {"note": text} in map(json.loads, out.splitlines())


@given(TEXTS)
@example(HOSTILE)
@SHORT
def test_the_trainers_lines(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    Log(tmp_path_factory.getbasetemp(), True).say(text)
    check(text, capsys.readouterr().out)
    broken = BrokenSamples()
    broken.add("a", ("s", "h"), 1, text)
    check(text, capsys.readouterr().err)


# -- the commands ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a hostile name, with a corpus in which every text is hostile, and another corpus in that one."""
    made = tmp_path_factory.mktemp("terminal") / IN_NAMES
    made.mkdir()
    corpus = Corpus.create(made / "corpus", HOSTILE, shard_samples=4)
    Corpus.create(made / "corpus" / IN_NAMES, HOSTILE)
    corpus.declare_source(SOURCE, {"adapter": HOSTILE})
    scores = {"phash": "string", "pixels_sha256": "string"}
    declared = {"images": IMAGE_SCALARS, "captions/source": {"caption": "string", "tokens": "int32"}}
    for column, scalars in {**declared, "scores/basic": scores}.items():
        corpus.declare_column(column, {"stage": HOSTILE, "model": HOSTILE}, scalars)
    texts = dict.fromkeys(("caption", "origin", "license"), HOSTILE) | {"fields": json.dumps({HOSTILE: HOSTILE})}
    numbers = dict.fromkeys(("width", "height", "original_width", "original_height", "bytes"), 64)
    rows = list(enumerate(keys_of(REF, 4)))
    with begin_attempt(corpus, "images", REF) as attempt:
        for row, key in rows[1:]:
            attempt.add(row, key, {"jpg": b"-", "json": b"{}"}, **texts, **numbers, format="jpeg", sha256="0" * 64)
        attempt.fail(*rows[0], "not_an_image", HOSTILE)
        images = attempt.commit()
    for column in ("captions/source", "scores/basic"):
        values = (
            {"phash": f"{5:016x}", "pixels_sha256": "1" * 64}
            if "basic" in column
            else {"caption": HOSTILE, "tokens": 1}
        )
        with begin_attempt(corpus, column, REF, [images]) as attempt:
            for row, key in rows[1:]:
                attempt.add(row, key, **values)
            attempt.fail(*rows[0], "upstream", HOSTILE)
            attempt.commit()
    commit_unit(corpus, SOURCE, UNIT, 4, [REF.shard])
    write_failure(
        corpus, "captions/source", SOURCE, f"{UNIT}-01", stage=HOSTILE, attempts=1, message=HOSTILE, traceback=""
    )
    corpus.store.create(f"commits/{IN_NAMES}", b"")
    return made


ALL = "SELECT * FROM samples"
CAPTIONS = "SELECT caption_source FROM samples WHERE status = 'ok'"
COMMANDS = [
    ["status", "corpus"],
    ["query", "corpus", ALL],
    ["query", "corpus", CAPTIONS],
    ["query", "corpus", "SELECT nothing_of_the_kind, '\x1b[31mEVIL\x9b\u202e' FROM samples"],
    ["query", "corpus", 'SELECT caption_source AS "\x1b[31mEVIL\x9b\u202e[red]" FROM samples'],
    ["verify", "corpus"],
    ["ls", "corpus", "images"],
    ["gc", "corpus", "--older-than-hours", "0"],
    ["select", "corpus", "all", "SELECT source, shard, row FROM samples WHERE status = 'ok'"],
    ["select", "corpus", HOSTILE, ALL],
    ["dedup", "corpus"],
    ["decontaminate", "corpus", "--against", "corpus"],
    ["report", "corpus", "--out", f"{IN_NAMES}.html"],
    ["build", "config.yaml"],
    ["build", "config.yaml", f"{IN_NAMES}=1"],
    ["plan", "plan.yaml", "--samples", "web=10"],
    ["plan", f"{IN_NAMES}.yaml"],
    ["convert", "corpus", "mds"],
    ["convert", IN_NAMES, "mds"],
    ["train", f"{IN_NAMES}.yaml"],
    ["generate", "--checkpoint", IN_NAMES, "--prompt", HOSTILE, "--out", IN_NAMES],
    ["generate", "--checkpoint", "corpus", "--prompt", HOSTILE, "--device", IN_NAMES],
    *(["status", "corpus/" + IN_NAMES + end] for end in ("", "/none")),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("as_json", [False, True])
def test_every_command(folder: Path, arguments: list[str], as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if as_json and arguments[0] in ("ls", "report", "train", "generate"):
        pytest.skip("it has no --json")
    monkeypatch.chdir(folder)
    (folder / "list.tsv").write_text("http://127.0.0.1:9/x.jpg\tone\n")
    source = {"adapter": "urls", "list": "list.tsv", "license": HOSTILE}
    (folder / "config.yaml").write_text(json.dumps({"name": HOSTILE, "corpus": "corpus", "sources": {"demo": source}}))
    (folder / "plan.yaml").write_text(json.dumps({"name": HOSTILE, "corpus": "none", "sources": {"web": source}}))
    result = CliRunner().invoke(app, [*arguments, *(["--json"] if as_json else [])])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert not obeyed(result.stdout) and not obeyed(result.stderr), ascii(result.output)
    if as_json and result.exit_code in (0, 1):
        json.loads(result.stdout)
    if arguments[-1] == CAPTIONS and as_json:
        assert {row["caption_source"] for row in json.loads(result.stdout)["rows"]} == {HOSTILE}
    elif arguments[-1] == CAPTIONS:
        assert literal(HOSTILE) in "".join(result.stdout.split())
