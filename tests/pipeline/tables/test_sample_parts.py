"""The sample table in parts: as it was in one piece, and no part is made twice."""

import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import DamagedError, RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.corpus.retry_units import RetryUnit, retry_name
from microdit.pipeline.selection.selections import load_selection, select
from microdit.pipeline.selection.view import query
from microdit.pipeline.storage.disk import Disk
from microdit.pipeline.tables import part_specs, sample_parts
from microdit.pipeline.tables.part_files import read_batches
from microdit.pipeline.tables.sample_table import sample_table, table_schema
from tests.pipeline.helpers.old_sample_table import old_sample_table
from tests.pipeline.helpers.small_corpus import (
    COLUMNS,
    FAILED,
    SOURCE,
    fill,
    make_corpus,
    replace,
    write_column,
    write_images,
)

EXTRA = "scores/more"
CHANGES = ["grow", "column", "repair", "cache", "declare", "retry", "again"]
NAMES = [
    *("id", "unit", "shard", "row", "status", "width", "caption_source", "caption_source_tokens", "basic_sharpness"),
    *("has_latents_demo_64", "has_text_minilm_source", "text_minilm_source_tokens"),
]
FORMS = [
    "SELECT {a}, {b} FROM samples ORDER BY id",
    "SELECT {a}, count(*) AS n FROM samples WHERE {b} IS NOT NULL GROUP BY 1 ORDER BY ALL",
    "SELECT * FROM samples ORDER BY id",
    "SELECT max({a}) AS m, min({b}) AS l FROM samples WHERE status = 'ok'",
    "SELECT x.{a}, y.{b} FROM samples x JOIN samples y USING (source, shard, row) ORDER BY x.id",
    "SELECT {a} FROM samples QUALIFY row_number() OVER (PARTITION BY {b} ORDER BY id) = 1 ORDER BY ALL",
    "SELECT s FROM samples AS s ORDER BY s.id",
    "SELECT count(*) AS n FROM samples NATURAL JOIN samples AS other WHERE {a} IS NOT NULL",
    "WITH w AS (SELECT {a}, {b} FROM samples) SELECT * FROM w ORDER BY ALL",
]


def _ref(unit: int, shard: int) -> ShardRef:
    name = unit_name(SOURCE, unit)
    return ShardRef(source=SOURCE, unit=name, shard=shard_name(name, shard))


def _parts(corpus: Corpus) -> set[str]:
    return set(corpus.store.names(sample_parts.FOLDER))


class _Changes:
    """A corpus that changes, a step at a time."""

    def __init__(self, root: Path):
        self.corpus, self.unit = make_corpus(root), 0
        self.grow()

    def grow(self) -> None:
        for shard in range(2):
            write_images(self.corpus, _ref(self.unit, shard))
        self.unit += 1

    def column(self) -> None:
        for column in COLUMNS:
            done = self.corpus.committed(column)
            for commit in self.corpus.commits("images"):
                if (commit.source, commit.shard) not in done and "-r" not in commit.unit:
                    write_column(self.corpus, column, {"images": commit})
                    break

    def repair(self) -> None:
        commit = self.corpus.commits("images")[0]
        write_images(self.corpus, commit.ref, failed=(), generation=commit.generation + 1)

    def cache(self) -> None:
        self.corpus.store.delete(list(self.corpus.store.names("tables")))

    def declare(self) -> None:
        self.corpus.declare_column(EXTRA, {"stage": "scores"}, {"sharpness": "float32"})
        if not self.corpus.committed(EXTRA):
            write_column(self.corpus, EXTRA, {"images": self.corpus.commits("images")[-1]})

    def retry(self) -> None:
        unit = unit_name(SOURCE, self.unit - 1)
        name = retry_name(SOURCE, unit, 1)
        if not self.corpus.store.exists(name):
            again = RetryUnit(source=SOURCE, unit=f"{unit}-r1", inputs={"http_404": [FAILED[0]]})
            self.corpus.store.create(name, again.to_bytes())
            ref = ShardRef(source=SOURCE, unit=f"{unit}-r1", shard=shard_name(f"{unit}-r1", 0))
            write_images(self.corpus, ref, failed=(), rows=1, keys=[f"{unit}-00-{FAILED[0]}"])

    def again(self) -> None:
        """Remove a commit, and make it again with other rows that are good."""
        commit = self.corpus.commits("images")[-1]
        self.corpus.store.delete([commit.name])
        time.sleep(0.01)
        write_images(self.corpus, commit.ref, failed=(0,), generation=commit.generation, rows=commit.counts["in"])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.sampled_from(CHANGES), min_size=2, max_size=5),
    asked=st.lists(
        st.tuples(st.sampled_from(FORMS), st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=20, max_size=20
    ),
    run=st.sampled_from([1, 2, 128]),
)
def test_queries_give_what_the_whole_table_gives(
    tmp_path_factory: pytest.TempPathFactory, changes: list[str], asked: list[tuple[str, str, str]], run: int
) -> None:
    """200 queries in all, after growth, repair, new columns, a removed cache, a retry unit and a commit made again."""
    note(f"{changes}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_specs, "RUN_SHARDS", run)
        made = _Changes(tmp_path_factory.mktemp("changing"))
        for number, change in enumerate(changes):
            sample_table(made.corpus, reads=None)  # the parts of now are there
            getattr(made, change)()
            old = old_sample_table(made.corpus)
            table = sample_table(made.corpus)
            names = table_schema(made.corpus.columns()).names
            batches = list(read_batches(made.corpus, table, names))
            assert pa.concat_tables([old.schema.empty_table(), *batches]).equals(old)
            with duckdb.connect() as connection:
                connection.register("samples", old)
                for form, a, b in asked[number :: len(changes)]:
                    sql = form.format(a=a, b=b)
                    assert query(made.corpus, sql).to_pylist() == connection.sql(sql).to_arrow_table().to_pylist(), sql


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sidecars that are read one by one."""
    names: list[str] = []
    get = Disk.get_buffer

    def watched(self: Disk, name: str) -> memoryview:
        if not name.startswith("tables/"):
            names.append(name.split(".")[0])
        return get(self, name)

    monkeypatch.setattr(Disk, "get_buffer", watched)
    return names


def _names(*refs: ShardRef, column: str = "images") -> list[str]:
    return sorted(f"{column}/{ref.source}/{ref.shard}" for ref in refs)


def test_growth_and_a_new_column_make_only_their_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    monkeypatch.setattr(part_specs, "RUN_SHARDS", 2)
    made = _Changes(tmp_path)
    made.grow()
    query(made.corpus, "SELECT 1")
    before = _parts(made.corpus)
    assert len(before) == 2  # a unit each
    read.clear()
    query(made.corpus, "SELECT count(*) FROM samples")
    assert read == []
    made.grow()
    query(made.corpus, "SELECT 1")
    assert sorted(read) == _names(_ref(2, 0), _ref(2, 1)) and len(_parts(made.corpus) - before) == 1
    before = _parts(made.corpus)
    made.declare()
    read.clear()
    query(made.corpus, "SELECT 1")
    assert read == [] and before == _parts(made.corpus)
    query(made.corpus, "SELECT more_sharpness FROM samples")
    assert read == _names(_ref(2, 1), column=EXTRA) and before < _parts(made.corpus) and len(_parts(made.corpus)) == 6


def test_only_what_a_query_names_is_made_and_in_one_pass(tmp_path: Path, read: list[str]) -> None:
    made = _Changes(tmp_path)
    fill(made.corpus, units=2)
    refs = [_ref(unit, shard) for unit in range(2) for shard in range(2)]

    def columns() -> set[str]:
        return {name.rpartition("/")[0].removesuffix(f"/{SOURCE}") for name in read}

    query(made.corpus, "SELECT avg(width) AS width, bool_or(has_latents_demo_64) AS ok FROM samples WHERE row > 1")
    assert sorted(read) == sorted([*_names(*refs), *_names(*refs, column="latents/demo-64")])
    assert len(_parts(made.corpus)) == 2
    read.clear()
    assert query(made.corpus, "SELECT caption_source_tokens FROM samples WHERE caption_source_tokens > 1").num_rows
    assert columns() == {"captions/source"} and len(_parts(made.corpus)) == 3
    read.clear()
    query(made.corpus, "SELECT id, caption_source FROM samples")
    assert columns() == {"images", "captions/source"} and len(read) == 2 * len(refs) and len(_parts(made.corpus)) == 5
    read.clear()
    with pytest.raises(RequestError, match="captoin"):
        query(made.corpus, "SELECT captoin FROM samples")
    with pytest.raises(RequestError, match="syntax"):
        query(made.corpus, "SELECT * FROM samples WHERE")
    named = query(made.corpus, "DESCRIBE samples")["column_name"].to_pylist()
    assert read == []
    assert named == query(made.corpus, "SELECT * FROM samples").column_names
    assert columns() == {"images", "scores/basic", "text/minilm@source"}
    assert len(read) == len(set(read)) == 3 * len(refs)  # in one pass, whatever the fields


def test_a_selection_of_all_columns_reads_its_conditions_alone(tmp_path: Path, read: list[str]) -> None:
    made = _Changes(tmp_path)
    fill(made.corpus, units=2)
    where = "WHERE status = 'ok' AND basic_sharpness >= 0.1"
    first = select(made.corpus, "x", f"SELECT * FROM samples {where}")
    assert {name.rpartition("/")[0] for name in read} == {f"images/{SOURCE}", f"scores/basic/{SOURCE}"}
    assert len(_parts(made.corpus)) == 2
    plain = select(made.corpus, "x", f"SELECT source, shard, row FROM samples {where}")
    assert load_selection(made.corpus, f"x@{first.hash}").equals(load_selection(made.corpus, f"x@{plain.hash}"))
    assert first.columns.keys() == {"images", *COLUMNS}  # as it always was
    for more in (
        *("ORDER BY ALL LIMIT 3", "ORDER BY 3, source, shard, row LIMIT 3", "ORDER BY #2, id LIMIT 3"),
        "QUALIFY row_number() OVER (PARTITION BY caption_source ORDER BY id) = 1",
    ):
        sql = f"SELECT * FROM samples {where} {more}"
        chosen = load_selection(made.corpus, f"y@{select(made.corpus, 'y', sql).hash}")
        with duckdb.connect() as connection:
            connection.register("samples", old_sample_table(made.corpus))
            expected = connection.sql(f"SELECT source, shard, row FROM ({sql}) ORDER BY ALL").fetchall()
        assert [tuple(line.values())[:3] for line in chosen.to_pylist()] == expected


def test_processes_of_their_own_make_the_same_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_specs, "RUN_SHARDS", 2)
    made = _Changes(tmp_path)
    fill(made.corpus, units=4)
    here = sample_table(made.corpus, reads=None)
    made.cache()
    monkeypatch.setattr(sample_parts, "APART_SHARDS", 4)
    monkeypatch.setattr(sample_parts.os, "cpu_count", lambda: 2)
    began: list[int] = []
    bounded = sample_parts.run_bounded
    monkeypatch.setattr(
        sample_parts, "run_bounded", lambda *args, **options: (began.append(1), bounded(*args, **options))[1]
    )
    assert sample_table(made.corpus, reads=None) == here and began
    shard = made.corpus.commits("scores/basic")[1]
    made.cache()
    replace(made.corpus, shard.sidecar.name, b"damaged")
    with pytest.raises(DamagedError, match=shard.sidecar.name):
        sample_table(made.corpus, reads=None)
    damage: list[str] = []
    table = sample_table(made.corpus, damage, reads=None)
    assert len(damage) == 1 and shard.sidecar.name in damage[0]
    values = pa.concat_tables(read_batches(made.corpus, table, ["shard", "basic_sharpness", "width"]))
    lost = values.filter(pc.equal(values["shard"], shard.shard))
    assert lost["basic_sharpness"].null_count == len(lost) and values["basic_sharpness"].null_count < len(values)


@pytest.mark.parametrize("run", [1, 128])
def test_runs_keep_to_whole_units_and_to_the_order_of_shards(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_specs, "RUN_SHARDS", run)
    shards = [("b", shard_name(unit_name("b", unit), n)) for unit in (0, 1, 7, 150) for n in range(unit % 5 + 1)]
    shards += [("a", "another-name"), ("a", shard_name("a-000001-r1", 0)), ("b", shard_name("b-000001-r1", 0))]
    runs = part_specs.runs_of(reversed(shards))
    assert [shard for one in runs for shard in one] == sorted(shards)
    of_unit = {(source, name[:8]): number for number, one in enumerate(runs) for source, name in one}
    assert all(of_unit[source, name[:8]] == number for number, one in enumerate(runs) for source, name in one)
    grown = part_specs.runs_of([*shards, ("b", shard_name(unit_name("b", 151), 0))])
    assert sum(one not in grown for one in runs) <= 1


def test_a_part_that_was_changed_is_refused(tmp_path: Path) -> None:
    made = _Changes(tmp_path)
    made.column()
    query(made.corpus, "SELECT * FROM samples")
    longer = sample_table(made.corpus, reads=None).parts["scores/basic", ""][0].name
    other = sample_table(made.corpus).parts["images", ""][0].name
    replace(made.corpus, longer, made.corpus.store.get(other))
    with pytest.raises(ValueError, match=rf"{longer} is damaged \(its columns are .*remove the folder tables/samples"):
        query(made.corpus, "SELECT basic_sharpness FROM samples")
    assert query(made.corpus, "SELECT count(*) AS n FROM samples")["n"].to_pylist() == [12]  # reads it not
