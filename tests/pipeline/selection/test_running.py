"""SQL of strangers: what it may do, and how it is stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.queries import parse
from microdit.pipeline.selection.selections import select, select_apart
from microdit.pipeline.selection.view import query, query_apart
from microdit.pipeline.tables.database import SqlLimits
from tests.pipeline.helpers.small_corpus import fill, make_corpus

ENDLESS = "SELECT count(*) FROM range(1000000000000)"
DEAF = "SELECT levenshtein(repeat('ab', 200000), repeat('ba', 200000))"  # DuckDB asks for no interrupt in it


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    made = make_corpus(tmp_path_factory.mktemp("sql") / "corpus")
    fill(made, units=1)
    query(made, "SELECT 1")  # the table is made
    yield made


@pytest.mark.parametrize(
    "sql",
    [
        "EXPLAIN ANALYZE COPY (SELECT 1) TO ':memory:.wal'",
        "EXPLAIN (ANALYZE) COPY (SELECT 1) TO ':memory:.wal'",
        "EXPLAIN COPY (SELECT 1) TO ':memory:.wal'",
        "COPY (PIVOT samples ON status USING count(*)) TO ':memory:.wal'",
        "EXPLAIN ANALYZE COPY (PIVOT samples ON status USING count(*)) TO ':memory:.wal'",
        "CREATE TABLE x AS PIVOT samples ON status USING count(*)",
        "EXPLAIN ANALYZE CREATE TABLE x AS SELECT 1",
        "EXPLAIN ANALYZE SET threads = 1",
        "EXPLAIN SELECT 1; COPY (SELECT 1) TO ':memory:.wal'",
    ],
)
def test_nothing_but_a_select_is_run(corpus: Corpus, sql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"^SQL: [A-Z, ]+; expected one SELECT over the view samples$"):
        query(corpus, sql)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["EXPLAIN ", "explain analyze\n", "EXPLAIN (ANALYZE) ", "EXPLAIN (FORMAT json) "])
def test_a_select_is_explained(corpus: Corpus, how: str) -> None:
    assert query(corpus, f"{how}SELECT count(*) FROM samples").num_rows


NESTED = ("NOT {}", "({})", "{}::INT", "{} + 1", "CASE WHEN true THEN {} END")
DEEPEST = ("NOT {}", "{}::INT", "{} + 1")  # DuckDB's own parser takes seconds for the other two


@pytest.mark.parametrize(
    ("nested", "depth"), [*product(NESTED, (300, 900)), *((nested, 100_000) for nested in DEEPEST)]
)
def test_what_is_nested_deeply_is_refused(corpus: Corpus, nested: str, depth: int) -> None:
    before, after = nested.split("{}")
    sql = f"SELECT source, shard, row FROM samples WHERE {before * depth}true{after * depth}"
    for refused in (query, parse, lambda *given: select(given[0], "x", given[1])):
        with pytest.raises(RequestError, match=r"^SQL: it is nested too deeply; expected at most 250 levels$"):
            refused(sql) if refused is parse else refused(corpus, sql)  # type: ignore[operator]


def test_nested_queries_are_refused_or_analysed() -> None:
    for depth in (10, 100, 150, 200, 500, 900):
        sql = "SELECT * FROM " + "(SELECT * FROM " * depth + "samples" + ")" * depth
        try:
            assert parse(sql).star and parse(sql).conditions() is None
        except RequestError as error:
            assert "too deeply" in str(error)


def test_limits_of_time_and_memory(corpus: Corpus) -> None:
    for sql, run in ((ENDLESS, query), (ENDLESS, query_apart), (DEAF, query_apart)):
        with pytest.raises(RequestError, match=r"^SQL: it was stopped after 2 seconds; give it a longer --timeout"):
            run(corpus, sql, SqlLimits(seconds=2))
    little = SqlLimits(memory=100_000_000, disk=50_000_000)
    with pytest.raises(RequestError, match=r"needs more than 0.0931 GiB of memory; give it more with --memory"):
        query(corpus, "SELECT * FROM range(1000000000)", little)
    settings = "SELECT current_setting('memory_limit') AS m, current_setting('max_temp_directory_size') AS d"
    assert query(corpus, settings, little).to_pylist() == [{"m": "95.3 MiB", "d": "47.6 MiB"}]
    with pytest.raises(RequestError, match="of memory; give it more with --memory"):
        query_apart(corpus, "SELECT list_sort(range(300000000))[1]", little)


def test_a_query_apart_gives_the_same(corpus: Corpus) -> None:
    sql = "SELECT * FROM samples ORDER BY id"
    assert query_apart(corpus, sql, SqlLimits()).equals(query(corpus, sql))
    with pytest.raises(RequestError, match=r"^SQL: Binder Error.*widht"):
        query_apart(corpus, "SELECT widht FROM samples", SqlLimits())


@pytest.mark.parametrize("end", ["", ";", " ; -- so", "\n-- so\n"])
def test_a_selection_computes_no_other_columns(corpus: Corpus, end: str) -> None:
    where = "FROM samples WHERE status = 'ok' ORDER BY width DESC LIMIT 3"
    slow = f"SELECT *, (SELECT levenshtein(repeat('ab', 200000), repeat(id, 90000))) AS caption_source {where}{end}"
    slow = slow.replace("SELECT *,", "SELECT * EXCLUDE (caption_source),", 1)
    for sql in (f"SELECT * {where}{end}", slow) if "; --" not in end else (f"SELECT * {where}{end}",):
        assert select(corpus, "wide", sql, limits=SqlLimits(seconds=5)).rows == 3
    with pytest.raises(RequestError, match=r"it gives the columns \['source', 'shard', 'row', 'source"):
        select(corpus, "wide", f"SELECT source, shard, row, source {where}")


@pytest.mark.parametrize("sql", [ENDLESS, DEAF])
def test_a_selection_apart_is_stopped(corpus: Corpus, sql: str) -> None:
    where = f"WHERE status = 'ok' AND ({sql}) > 0"
    with pytest.raises(RequestError, match="it was stopped after 2 seconds"):
        select_apart(corpus, "never", f"SELECT * FROM samples {where}", None, SqlLimits(seconds=2))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("sql", [ENDLESS, DEAF])
def test_a_signal_ends_a_query_within_a_second(
    corpus: Corpus, tmp_path: Path, sql: str, number: int, status: int
) -> None:
    command = [sys.executable, "-c", "from microdit.pipeline.cli.app import main; main()", "query", corpus.url, sql]
    process = subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob("microdit-sql-*")) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.5)
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - began < 3  # a second on a machine that does nothing else
    assert (process.returncode, "Traceback" in errors) == (status, False), errors
    assert "stopped by SIG" in errors and not list(tmp_path.glob("microdit-sql-*"))
