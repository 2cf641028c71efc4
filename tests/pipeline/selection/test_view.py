"""SQL over the view `samples`: what it gives, and what it refuses."""

from collections.abc import Iterator

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.view import query
from tests.pipeline.helpers.small_corpus import (
    SOURCE,
    fill,
    make_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    """Two units of two shards with all columns; for tests that only read."""
    made = make_corpus(tmp_path_factory.mktemp("samples") / "corpus")
    fill(made, units=2)
    yield made


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC", "syntax error"),
        ("SELECT widht FROM samples", '"widht" not found.*'),
        ("SELECT * FROM sample", "sample does not exist"),
        ("", "nothing; expected one SELECT"),
        ("SELECT 1; SELECT 2", "SELECT, SELECT; expected one"),
        ("DROP VIEW samples", "DROP; expected"),
        ("COPY samples TO 'x.csv'", "COPY; expected"),
        ("SET enable_external_access = true", "SET; expected"),
        ("ATTACH 'x.db'", "ATTACH; expected"),
        ("SELECT * FROM '/etc/passwd'", "does not exist"),
        ("SELECT * FROM read_text('/etc/passwd')", "disabled by configuration"),
        ("SELECT * FROM read_parquet('https://example.org/x.parquet')", "disabled by configuration"),
        ("SELECT * FROM file", "file does not exist"),  # a variable of the code that runs the query
    ],
)
def test_wrong_and_hostile_sql(corpus: Corpus, sql: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"^SQL: (?s:.*){message}"):
        query(corpus, sql)


def test_sql_of_many_kinds(corpus: Corpus) -> None:
    assert query(corpus, "SELECT status, count(*) AS n FROM samples GROUP BY 1 ORDER BY 1").to_pylist() == [
        {"status": "failed", "n": 4},
        {"status": "ok", "n": 20},
    ]
    (sums,) = query(corpus, "SELECT sum(row) AS small, sum(2::HUGEINT ** 100) AS large FROM samples").to_pylist()
    assert sums == {"small": 4 * 15, "large": 24 * 2**100} and type(sums["small"]) is int
    assert query(corpus, "DESCRIBE samples").num_rows == query(corpus, "SELECT * FROM samples").num_columns
    assert query(corpus, "WITH a AS (FROM samples) SELECT max(row) AS m FROM a")["m"].to_pylist() == [5]
    assert query(corpus, "PIVOT samples ON status USING count(*) GROUP BY source").to_pylist() == [
        {"source": SOURCE, "failed": 4, "ok": 20}
    ]
