"""Retry units over random failures, kills and repairs: each input counts once, and nothing that was good is lost."""

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import UNITS, shard_name
from microdit.pipeline.corpus.reasons import may_pass, named_by, surely_passing
from microdit.pipeline.corpus.retry_units import list_retry_units, read_retries, retry_names
from microdit.pipeline.engine.failed_rows import make_again
from microdit.pipeline.engine.plan import Plan
from microdit.pipeline.engine.retries import Retries
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.ingest import SCALARS, ingest_stage, ingest_unit
from microdit.pipeline.storage import disk
from microdit.pipeline.tables.corpus_totals import corpus_totals
from microdit.pipeline.tables.part_files import read_batches
from microdit.pipeline.tables.sample_table import sample_table
from microdit.pipeline.upkeep.damage import damage
from microdit.pipeline.upkeep.gc import gc
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.stages.test_ingest import Given, config, jpeg

UNIT = "given-000000"
PICTURE = jpeg()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "sync", lambda path: None)


DETAILS = {"dns": "there is no such host: a", "truncated": "the transfer broke off: b"}


@dataclass
class Web(Given):
    """URLs, each with the reasons for which it fails, one after the other, before it comes (None)."""

    fails: list[list[str | None]] = field(default_factory=list)
    tried: Counter[int] = field(default_factory=Counter)
    dies: int | None = None
    fetches_rows = True

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        assert unit == UNIT
        for ordinal, reasons in enumerate(self.fails):
            key = f"{ordinal:09d}"
            if not wanted(ordinal):
                yield Input(ordinal, key, None)
                continue
            if self.dies is not None:
                if not self.dies:
                    raise ConnectionError("killed")
                self.dies -= 1
            reason = reasons[min(self.tried[ordinal], len(reasons) - 1)]
            self.tried[ordinal] += 1
            detail = DETAILS.get(reason or "", "") if reason else ""
            yield Input(ordinal, key, None if reason else PICTURE, reason=reason, detail=detail)


def open_corpus(folder: Path) -> tuple[Corpus, BuildConfig]:
    about = config(folder)
    corpus = Corpus.create(folder / "corpus", "tried", 4)
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_source("given", {"adapter": "given", "units": 1, "images": ingest_stage(about.images)})
    return corpus, about


def run(
    corpus: Corpus, about: BuildConfig, source: Given, retry: bool = False, repair: bool = False, rows: tuple = ()
) -> int:
    """Build without Ray, until a unit breaks off; how many units were read."""
    redo = damage(corpus).redo if repair else {}
    if retry or rows:
        assert make_again(corpus, [source], ["images"], retry, rows, redo, lambda note: None) == {}
    units = [UNIT, *retry_names(list_retry_units(corpus).get("given", {}))]
    plan, read = Plan(corpus, {"given": units}, [], None, True, redo), 0
    while plan.units:
        read += 1
        with suppress(ConnectionError, ValueError):  # killed; what was lost did not come
            ingest_unit(corpus, source, Retries(1, 4).unit_task(plan.units.popleft()), about)
    return read


def check(corpus: Corpus, source: Web) -> None:
    total = corpus_totals(corpus)["images", "given"]
    inputs = len(source.fails)
    assert (total.inputs, total.out + total.failed) == (inputs, inputs)
    assert sum(total.reasons.values()) == total.failed
    batches = read_batches(corpus, sample_table(corpus), ["key", "status", "reason"])
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert sorted(row["key"] for row in rows) == [f"{n:09d}" for n in range(inputs)]
    assert Counter(row["reason"] for row in rows if row["status"] == "failed") == total.reasons


outcomes = st.sampled_from([None, None, "timeout", "http_503", "http_404", "dns", "truncated"])


@settings(
    max_examples=8,
    phases=[Phase.generate],
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_every_input_counts_once(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    corpus, about = open_corpus(tmp_path_factory.mktemp("web"))
    fails = data.draw(st.lists(st.lists(outcomes, min_size=1, max_size=3), min_size=1, max_size=14))
    source = Web([], fails=fails)
    run(corpus, about, source)
    check(corpus, source)
    for _ in range(data.draw(st.integers(1, 4))):
        good = corpus_totals(corpus)["images", "given"].out
        step = data.draw(st.sampled_from(["retry", "killed", "damaged", "both"]))
        if step == "killed":
            source.dies = data.draw(st.integers(0, 5))
            run(corpus, about, source, retry=True)
            source.dies = None
            check(corpus, source)
            run(corpus, about, source)  # it goes on with what was begun
        elif step != "retry":
            commit = data.draw(st.sampled_from(corpus.commits("images")))
            corpus.store.delete([data.draw(st.sampled_from([commit.object.name, commit.sidecar.name]))])
            run(corpus, about, source, repair=True, retry=step == "both")
            good = 0  # what the source does not give again is lost
        else:
            run(corpus, about, source, retry=True)
        check(corpus, source)
        assert corpus_totals(corpus)["images", "given"].out >= good
    assert {problem.kind for problem in verify(corpus).problems} <= {"unrepaired"}
    source.fails = [[None]] * len(fails)
    run(corpus, about, source, retry=True)
    run(corpus, about, source, repair=True)
    check(corpus, source)
    assert not verify(corpus).problems
    left = corpus_totals(corpus)["images", "given"].reasons
    assert set(left) <= {"http_404", "dns"}
    for name in left:
        run(corpus, about, source, rows=(name,))
    assert corpus_totals(corpus)["images", "given"].out == len(fails)
    assert not verify(corpus).problems


def test_rows_of_several_levels_come_together(tmp_path: Path) -> None:
    """The second retry unit takes what failed again in the first, in the order of the unit; others stay."""
    corpus, about = open_corpus(tmp_path)
    source = Web([], fails=[["timeout", "http_503", None], [None], ["http_404"], ["timeout", None]] * 3)
    run(corpus, about, source)
    assert run(corpus, about, source, retry=True) == 1
    assert run(corpus, about, source, retry=True) == 1
    assert run(corpus, about, source, retry=True) == 0
    first, second = read_retries(corpus, "given", UNIT)
    assert (first.unit, first.inputs) == (f"{UNIT}-r1", {"timeout": [0, 3, 4, 7, 8, 11]})
    assert (second.unit, second.inputs) == (f"{UNIT}-r2", {"http_503": [0, 4, 8]})
    units = corpus.units("given")
    assert units[f"{UNIT}-r1"].shards == [shard_name(f"{UNIT}-r1", 0), shard_name(f"{UNIT}-r1", 1)]
    assert units[f"{UNIT}-r2"].inputs == 3
    totals = corpus_totals(corpus)
    assert (totals["images", "given"].out, totals["images", "given"].reasons) == (9, {"http_404": 3})
    assert (totals[UNITS, "given"].done, totals[UNITS, "given"].inputs) == (1, 12)


def test_what_is_in_a_file_fails_again_and_is_left(tmp_path: Path) -> None:
    corpus, about = open_corpus(tmp_path)
    source = Web([], fails=[["timeout", None], ["damaged_row", None]])
    source.fetches_rows = False
    run(corpus, about, source)
    assert run(corpus, about, source, retry=True) == 0
    assert run(corpus, about, source, rows=("damaged_row",)) == 1  # unless it is asked for by its reason
    assert corpus_totals(corpus)["images", "given"].reasons == {"timeout": 1}


def test_a_unit_that_is_not_complete_is_read_first(tmp_path: Path) -> None:
    corpus, about = open_corpus(tmp_path)
    source = Web([], fails=[["timeout", None]] * 40, dies=38)
    run(corpus, about, source)
    notes: list[str] = []
    make_again(corpus, [source], ["images"], True, (), {}, notes.append)
    assert notes == [
        "source given: 1 units are not complete yet, and are read first; then the same command takes again what has "
        "failed of them"
    ]


@pytest.mark.parametrize(
    ("reason", "detail", "passes"),
    [
        ("http_429", "", True),
        ("http_503", "", True),
        ("http_529", "", True),
        ("http_404", "", False),
        ("http_403", "", False),
        ("timeout", "", True),
        ("connection", "", True),
        ("dns", "the name server did not answer: x", True),
        ("dns", "there is no such host: x", False),
        ("truncated", "the transfer broke off: x", True),
        ("truncated", "image file is truncated", False),
        ("not_an_image", "", False),
        ("too_small", "", False),
    ],
)
def test_which_reasons_may_pass(reason: str, detail: str, passes: bool) -> None:
    assert may_pass(reason, detail) == passes
    assert not surely_passing(reason) or passes


def test_reasons_are_named_alone_or_by_class() -> None:
    assert named_by("http_400", ["http_4xx"]) and named_by("http_400", ["http_400"])
    assert not named_by("http_500", ["http_4xx"]) and not named_by("http_4xx_", ["http_4xx"])
    assert not named_by("upstream", ["upstream"])


@pytest.mark.parametrize("source", ["sources", "columns", "commits"])
def test_the_record_of_a_retry_unit_is_no_part_of_another_corpus(tmp_path: Path, source: str) -> None:
    corpus, about = open_corpus(tmp_path)
    corpus.declare_source(source, {"adapter": "given", "images": ingest_stage(about.images)})
    corpus.store.create(f"units/{source}/{source}-000000-r1.json", b"{}")
    assert not gc(corpus, older_than_hours=0).foreign
    assert corpus.store.exists(f"units/{source}/{source}-000000-r1.json")
