"""Selections: immutable, named by their hash, and the same whenever and wherever they are made."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.exceptions import PermissionDeniedError

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import canonical
from microdit.pipeline.selection.selections import (
    SELECTION,
    changed_since,
    list_selections,
    load_selection,
    select,
    selection_hash,
)
from microdit.pipeline.selection.weights import parse_shares
from tests.pipeline.helpers.scored_corpus import OK, make
from tests.pipeline.helpers.small_corpus import (
    COLUMNS,
    SOURCE,
    fill,
    make_corpus,
    replace,
    write_column,
    write_images,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    """Two units of two shards with all columns; for tests that only read."""
    made = make_corpus(tmp_path_factory.mktemp("samples") / "corpus")
    fill(made, units=2)
    yield made


def _hash_of_names(corpus: Corpus, column: str) -> str:
    names = sorted(commit.name for commit in corpus.commits(column))
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


def test_a_selection_gives_back_its_rows(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus)
    made = select(corpus, "small", f"{OK} AND width <= 67 ORDER BY row DESC")
    assert made.rows == 6 and made.path == f"selections/small@{made.hash}.parquet"
    table = load_selection(Corpus.open(corpus_url), "small")
    assert table.schema.equals(SELECTION)
    shards = [shard_name(unit_name(SOURCE, 0), number) for number in range(2)]
    assert [tuple(line.values()) for line in table.to_pylist()] == [
        (SOURCE, shard, row, 1.0) for shard in shards for row in (0, 1, 3)
    ]
    assert json.loads(table.schema.metadata[b"microdit"]) == {
        "name": "small",
        "query": made.query,
        "rows": 6,
        "columns": {"images": _hash_of_names(corpus, "images")},
    }
    assert list_selections(corpus) == [made]
    data = corpus.store.get(made.path)
    assert select(corpus, "small", made.query) == made and corpus.store.get(made.path) == data
    write_column(corpus, "scores/basic", {"images": corpus.commits("images")[0]}, generation=1)
    assert select(corpus, "small", made.query) == made and not changed_since(corpus, f"small@{made.hash}")
    write_images(corpus, corpus.commits("images")[0].ref, generation=1)
    assert changed_since(corpus, f"small@{made.hash}") == ["images"]
    later = select(corpus, "small", made.query)  # of other commits
    assert later.hash != made.hash and load_selection(corpus, f"small@{made.hash}").equals(table)
    with pytest.raises(RequestError, match=rf"several.*small@({made.hash}|{later.hash}), small@"):
        load_selection(corpus, "small")


def test_the_same_corpus_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        corpus = make_corpus(tmp_path / name)
        fill(corpus)
        select(corpus, "x", f"SELECT *, 0.1 AS weight FROM ({OK})")
    files = [next((tmp_path / name / "selections").iterdir()) for name in ("a", "b")]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("sql", "columns"),
    [
        (f"{OK} AND basic_sharpness > 0", ["images", "scores/basic"]),
        (f"{OK} AND CAPTION_SOURCE != '' AND has_latents_demo_64", ["captions/source", "images", "latents/demo-64"]),
        ("SELECT * FROM samples WHERE status = 'ok'", ["images", *COLUMNS]),
        ("SELECT source, shard, row FROM samples s WHERE status = 'ok' ORDER BY s", ["images", *COLUMNS]),
        ("SELECT source, shard, row FROM samples WHERE status = 'ok' QUALIFY count(*) OVER () > 1", ["images"]),
    ],
)
def test_a_selection_pins_the_columns_that_it_reads(corpus: Corpus, sql: str, columns: list[str]) -> None:
    found = select(corpus, "pins", sql)
    assert found.columns == {column: _hash_of_names(corpus, column) for column in sorted(columns)}
    assert changed_since(corpus, f"pins@{found.hash}") == []


@pytest.mark.parametrize(
    ("sql", "what"),
    [
        (f"{OK} AND random() < 0.5", "random()"),
        (f"{OK} USING SAMPLE 5 ROWS", "SAMPLE without REPEATABLE"),
        ("SELECT source, shard, row FROM samples TABLESAMPLE 50% WHERE status = 'ok'", "SAMPLE without REPEATABLE"),
        (f"SELECT * FROM ({OK} ORDER BY uuid() LIMIT 3)", "uuid()"),
        (f"{OK} AND current_date > '2020-01-01'", "current_date"),
        (f"{OK} AND now() > '2020-01-01'", "now()"),
    ],
)
def test_what_gives_other_rows_every_time_is_refused(corpus: Corpus, sql: str, what: str) -> None:
    with pytest.raises(RequestError, match=re.escape(f"SQL: {what} gives something else every time")):
        select(corpus, "bad", sql)


@pytest.mark.parametrize("sql", ["PIVOT samples ON status USING count(*) GROUP BY source", "DROP VIEW samples", ""])
def test_a_selection_is_one_select(corpus: Corpus, sql: str) -> None:
    with pytest.raises(RequestError, match="expected one SELECT over the view samples"):
        select(corpus, "bad", sql)


def test_weights(corpus: Corpus) -> None:
    select(corpus, "weighted", "SELECT source, shard, row, 1 + row / 10 AS weight FROM samples WHERE status = 'ok'")
    table = load_selection(corpus, "weighted")
    assert table["weight"].to_pylist() == pytest.approx([1 + row / 10 for row in table["row"].to_pylist()])
    assert table["weight"].type == pa.float32()


def test_all_columns_of_samples_may_stand_in_a_selection(corpus: Corpus) -> None:
    made = select(corpus, "star", "SELECT * FROM samples WHERE status = 'ok' AND has_latents_demo_64")
    assert made.rows == 20 and load_selection(corpus, "star").column_names == SELECTION.names


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (
            "SELECT source, shard FROM samples",
            r"gives the columns \['source', 'shard'\]; expected source",
        ),
        (f"SELECT *, 2 AS wieght FROM ({OK})", "expected source, shard and row, and weight"),
        ("SELECT source, shard, row, row AS ROW FROM samples", "gives the columns"),
        ("SELECT source, shard, row FROM samples", r"4 of 24 rows .*row 2 of .*http_404\); add WHERE status = 'ok'"),
        (f"{OK} UNION ALL {OK}", "row 0 of shard demo-000000-00 of source demo is there 2 times"),
        ("SELECT 'demo' AS source, 'demo-000000-00' AS shard, 99 AS row", "there is no such row"),
        (f"SELECT source, shard, row / 2 AS row FROM ({OK})", "row must be int32"),
        (f"SELECT source, shard, [row] AS row FROM ({OK})", "row must be int32"),
        (f"SELECT source, NULL AS shard, row FROM ({OK})", "shard is null in 20 rows"),
        (f"{OK} AND width > 10000", "gives no rows"),
        (f"SELECT *, 0 AS weight FROM ({OK})", "a weight is 0.0; expected finite numbers above 0"),
        (f"SELECT *, 'NaN'::FLOAT AS weight FROM ({OK})", "a weight is nan"),
        (f"SELECT *, 1e300 AS weight FROM ({OK})", "a weight is inf"),
        (f"SELECT *, CASE WHEN row > 0 THEN 1 END AS weight FROM ({OK})", "weight is null in 4 rows"),
        (f"SELECT *, 'heavy' AS weight FROM ({OK})", "weight must be float"),
        ("SELECT nothing FROM samples", "nothing.* not found"),
    ],
)
def test_bad_selections_are_refused(corpus: Corpus, sql: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"SQL: (?s:.*){message}"):
        select(corpus, "bad", sql)
    assert not [item for item in list_selections(corpus) if item.name == "bad"]


@pytest.mark.parametrize("error", [partial(OSError, 30, "Read-only"), partial(PermissionDeniedError, "Forbidden")])
def test_where_nothing_may_be_written_a_selection_is_refused(
    corpus: Corpus, error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise error()

    for name in ("create", "scratch"):
        monkeypatch.setattr(type(corpus.store), name, refuse)
    with pytest.raises(RequestError, match=r"unheard-of@.*cannot be written .*needs the right to write"):
        select(corpus, "unheard-of", "SELECT * FROM samples WHERE status = 'ok' AND row = 1")


@pytest.mark.parametrize("name", ["", "a@b", "a/b", "../a", ".a", "a b"])
def test_bad_selection_names(corpus: Corpus, name: str) -> None:
    with pytest.raises(RequestError, match=re.escape(f"selection {name!r}")):
        select(corpus, name, OK)


@pytest.mark.parametrize("damage", ["cut", "rows", "schema", "metadata", "bytes"])
def test_a_damaged_selection_is_named(tmp_path: Path, damage: str) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1)
    path = tmp_path / select(corpus, "x", OK).path
    table = pq.read_table(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "bytes":
        path.write_bytes(b"")
    else:
        other = {
            "rows": table.slice(1),
            "schema": table.drop_columns(["weight"]),
            "metadata": table.replace_schema_metadata({"microdit": b"{}"}),
        }[damage]
        pq.write_table(other, path)
    with pytest.raises(RequestError, match=r"selections/x@.*\.parquet is damaged"):
        load_selection(corpus, "x")


def test_there_is_no_such_selection(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    with pytest.raises(RequestError, match=r"'x' .*no such selection; give one of: none, make one with"):
        load_selection(corpus, "x")
    with pytest.raises(RequestError, match=r"none, make one .*; `microdit select .* paper-512` makes it"):
        load_selection(corpus, "paper-512")
    fill(corpus, shards=1, columns=[])
    made = select(corpus, "y", OK)
    with pytest.raises(RequestError, match=f"no such selection; give one of: y@{made.hash}"):
        load_selection(corpus, "x")


SELECTED = st.lists(
    st.tuples(
        st.from_regex(r"[a-z0-9][a-z0-9_-]{0,5}", fullmatch=True),
        st.from_regex(r"[a-z0-9][a-z0-9_-]{0,9}", fullmatch=True),
        st.integers(0, 2**31 - 1),
        st.floats(width=32, min_value=0, exclude_min=True, allow_infinity=False),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None, print_blob=True)
@given(SELECTED, st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
def test_the_hash_is_that_of_the_page(rows: list[tuple[str, str, int, float]], about: dict[str, int]) -> None:
    """docs/reference/corpus.md, section 6, word by word; a stored selection has the hash that it had."""
    text = canonical({**about})
    table = pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * 4, schema=SELECTION)
    lines = "".join(f"{source}\t{shard}\t{row}\t{weight:.9g}\n" for source, shard, row, weight in rows)
    wanted = hashlib.sha256(text + b"\n" + lines.encode()).hexdigest()[:16]
    assert selection_hash(text, table) == wanted
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    assert selection_hash(text, pq.read_table(io.BytesIO(buffer.getvalue()))) == wanted


ROOT = Path(__file__).parents[3]

QUERIES = [
    f"{OK} AND width > 250",
    f"{OK} ORDER BY basic_sharpness LIMIT 7",  # nearly all are alike
    f"SELECT *, 1 / (1 + row) AS weight FROM ({OK}) LIMIT 9",
    "SELECT any_value(source) AS source, any_value(shard) AS shard, any_value(row) AS row FROM samples GROUP BY id",
]


@settings(max_examples=4, deadline=None, print_blob=True)
@given(st.integers(1, 2**32), st.sampled_from(QUERIES), st.sampled_from([None, "equal"]))
def test_the_order_of_the_commits_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, order: int, sql: str, weights: str | None
) -> None:
    folder = tmp_path_factory.mktemp("same")
    files = []
    for name, seed in (("one", 0), ("other", order)):
        corpus = make(folder / name, [("a", 9), ("b", 5)], ["scores/basic"], seed)
        shares = None if weights is None else parse_shares(weights)
        files.append(folder / name / select(corpus, "same", sql, shares).path)
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()


def test_processes_with_other_numbers_of_threads_make_the_same_file(tmp_path: Path) -> None:
    program = "from microdit.pipeline.cli.app import main; main()"
    names = []
    for threads, order in (("1", 3), ("4", 5)):
        make(tmp_path / threads, [("a", 9), ("b", 5)], ["scores/basic"], order)
        arguments = ["select", str(tmp_path / threads), "same", QUERIES[1], "--weights", "a=2,b=1", "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": threads, "ARROW_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        run = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        names.append(tmp_path / threads / json.loads(run.stdout)["path"])
    assert names[0].name == names[1].name and names[0].read_bytes() == names[1].read_bytes()


def test_a_flipped_bit_is_found_or_changes_no_row(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    selection = select(corpus, "x", "SELECT * FROM samples WHERE status = 'ok'")
    whole, rows = corpus.store.get(selection.path), load_selection(corpus, "x")
    found = 0
    for place in range(0, len(whole), 5):
        data = bytearray(whole)
        data[place] ^= 1
        replace(corpus, selection.path, bytes(data))
        try:
            assert load_selection(corpus, "x").equals(rows), place
        except RequestError:
            found += 1
    assert found > len(whole) // 10
