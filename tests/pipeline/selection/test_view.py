import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef, canonical
from microdit.pipeline.selection.selections import (
    SELECTION,
    changed_since,
    list_selections,
    load_selection,
    select,
    selection_hash,
)
from microdit.pipeline.selection.view import query
from microdit.pipeline.storage.store import open_store
from microdit.pipeline.tables.sample_table import sample_table
from tests.pipeline.helpers.small_corpus import (
    COLUMNS,
    FAILED,
    SHARD_SAMPLES,
    SOURCE,
    fill,
    make_corpus,
    write_column,
    write_images,
)

OK = "SELECT source, shard, row FROM samples WHERE status = 'ok'"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    """Two units of two shards with all columns; for tests that only read."""
    made = make_corpus(tmp_path_factory.mktemp("samples") / "corpus")
    fill(made, units=2)
    yield made


def _count(corpus: Corpus, condition: str) -> int:
    return int(query(corpus, f"SELECT count(*) AS n FROM samples WHERE {condition}")["n"][0].as_py())


def _hash_of_names(corpus: Corpus, column: str) -> str:
    names = sorted(commit.name for commit in corpus.commits(column))
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


# -- the table -------------------------------------------------------------------------------------------------------
def test_there_is_a_line_for_every_row(corpus: Corpus) -> None:
    table = query(corpus, "SELECT * FROM samples")
    assert len(table) == 4 * SHARD_SAMPLES
    assert table.column_names[:9] == ["id", "source", "unit", "shard", "row", "key", "status", "reason", "detail"]
    assert {"width", "license", "bytes", "caption_source", "caption_source_tokens", "basic_sharpness"} <= set(
        table.column_names
    )
    lines = table.to_pylist()
    assert [(line["shard"], line["row"]) for line in lines] == sorted((line["shard"], line["row"]) for line in lines)
    failed, whole = lines[FAILED[0]], lines[1]
    assert failed["id"] == "demo/demo-000000-00-2" and failed["unit"] == "demo-000000"
    assert (failed["status"], failed["reason"], failed["detail"]) == ("failed", "http_404", "the server said 404")
    assert failed["has_latents_demo_64"] is failed["has_text_minilm_source"] is False
    assert failed["width"] is failed["caption_source"] is failed["basic_sharpness"] is None
    assert whole["has_latents_demo_64"] is whole["has_text_minilm_source"] is True
    assert (whole["caption_source"], whole["caption_source_tokens"]) == ("picture 1 — é", 4)
    assert whole["text_minilm_source_tokens"] == 4 and whole["width"] == 65
    assert lines[0]["caption_source"] == ""  # an empty caption is one


def test_what_is_not_there_yet_is_null(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    assert query(corpus, "SELECT * FROM samples").num_rows == 0
    fill(corpus, shards=1, columns=["scores/basic"])
    (line,) = query(corpus, "SELECT * FROM samples WHERE row = 1").to_pylist()
    assert line["basic_sharpness"] == pytest.approx(0.1)
    assert line["caption_source"] is line["text_minilm_source_tokens"] is None
    assert line["has_latents_demo_64"] is False


def test_a_new_commit_generation_or_column_makes_a_new_table(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1, columns=["captions/source"])
    first = sample_table(corpus)
    assert sample_table(corpus) == first == sample_table(Corpus.open(corpus_url))
    ref = ShardRef(source=SOURCE, unit=unit_name(SOURCE, 0), shard=shard_name(unit_name(SOURCE, 0), 0))
    newer = write_images(corpus, ref, failed=(), generation=1)
    second = sample_table(corpus)
    assert (_count(corpus, "status = 'ok'"), first.rows, second.rows) == (SHARD_SAMPLES, SHARD_SAMPLES, SHARD_SAMPLES)
    write_column(corpus, "latents/demo-64", {"images": newer})
    third = sample_table(corpus)
    corpus.declare_column("scores/more", {"stage": "scores"}, {"x": "float32"})
    fourth = sample_table(corpus)
    assert len({table.object.name for table in (first, second, third, fourth)}) == 4
    assert len({table.commits for table in (first, second, third)}) == 3
    assert third.commits == fourth.commits  # nothing is committed in the new column
    assert "more_x" in query(corpus, "SELECT * FROM samples LIMIT 0").column_names
    assert third.names == sorted(
        [
            "commits/captions/source/demo/demo-000000-00.0.json",
            "commits/images/demo/demo-000000-00.1.json",
            "commits/latents/demo-64/demo/demo-000000-00.0.json",
        ]
    )
    assert third.commits == hashlib.sha256("".join(f"{name}\n" for name in third.names).encode()).hexdigest()


@pytest.mark.parametrize("damage", ["table", "manifest", "both", "nonsense", "elsewhere"])
def test_the_cache_may_be_deleted_at_any_time(corpus_url: str, damage: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1, columns=[])
    table = sample_table(corpus)
    manifest = next(item.name for item in corpus.store.list("tables") if item.name.endswith(".json"))
    gone = {"table": [table.object.name], "both": [table.object.name, manifest]}
    corpus.store.delete(gone.get(damage, [manifest]))
    if damage == "nonsense":
        corpus.store.create(manifest, b"\xff{")
    if damage == "elsewhere":
        elsewhere = table.object.model_copy(update={"name": "corpus.json"})
        corpus.store.create(manifest, table.model_copy(update={"object": elsewhere}).to_bytes())
    assert _count(corpus, "status = 'ok'") == SHARD_SAMPLES - 1
    assert corpus.store.exists(sample_table(corpus).object.name)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    path = tmp_path / sample_table(corpus).object.name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"tables/.* is damaged .*; remove the folder tables"):
        query(corpus, "SELECT 1")


def test_several_may_make_the_table_at_once(corpus_url: str) -> None:
    fill(make_corpus(corpus_url), shards=2, columns=[])
    barrier = threading.Barrier(3)

    def make(_: int) -> str:
        corpus = Corpus.open(corpus_url)
        barrier.wait(60)
        return sample_table(corpus).object.name

    with ThreadPoolExecutor(3) as pool:
        names = set(pool.map(make, range(3)))
    assert len(names) == 1
    assert {item.name for item in open_store(corpus_url).list("tables") if item.name.endswith(".parquet")} == names


def test_columns_that_would_have_one_name_are_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    corpus.declare_column("latents/demo_64", {})
    with pytest.raises(RequestError, match=r"'latents/demo-64' and .* would both be 'has_latents_demo_64'"):
        query(corpus, "SELECT 1")


def test_a_corpus_without_images(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="it has no images yet"):
        query(Corpus.create(tmp_path, "empty"), "SELECT 1")


def test_sidecars_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    ref = ShardRef(source=SOURCE, unit=unit_name(SOURCE, 0), shard=shard_name(unit_name(SOURCE, 0), 0))
    long = write_images(corpus, ref)
    write_column(corpus, "scores/basic", {"images": long})
    write_images(corpus, ref, rows=3, generation=1)
    with pytest.raises(RequestError, match=r"scores/basic/demo/demo-000000-00\.0\.json: .*6 rows, .*images 3"):
        query(corpus, "SELECT 1")


# -- SQL -------------------------------------------------------------------------------------------------------------
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


# -- selections ------------------------------------------------------------------------------------------------------
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


ROWS = st.lists(
    st.tuples(
        st.from_regex(r"[a-z0-9][a-z0-9_-]{0,5}", fullmatch=True),
        st.from_regex(r"[a-z0-9][a-z0-9_-]{0,9}", fullmatch=True),
        st.integers(0, 2**31 - 1),
        st.floats(width=32, min_value=0, exclude_min=True, allow_infinity=False),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None, print_blob=True)
@given(ROWS, st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
def test_the_hash_is_that_of_the_page(rows: list[tuple[str, str, int, float]], about: dict[str, int]) -> None:
    """docs/corpus.md, section 6, word by word; and a selection that was stored has the hash that it had before."""
    text = canonical({**about})
    table = pa.table([list(column) for column in zip(*rows, strict=True)] or [[]] * 4, schema=SELECTION)
    lines = "".join(f"{source}\t{shard}\t{row}\t{weight:.9g}\n" for source, shard, row, weight in rows)
    wanted = hashlib.sha256(text + b"\n" + lines.encode()).hexdigest()[:16]
    assert selection_hash(text, table) == wanted
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    assert selection_hash(text, pq.read_table(io.BytesIO(buffer.getvalue()))) == wanted
