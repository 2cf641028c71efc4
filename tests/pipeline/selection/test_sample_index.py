from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.selection.lineage import newest_commits
from microdit.pipeline.selection.sample_index import SampleIndex, index_samples, lowest
from tests.trainer.conftest import build_corpus, write_shard

COLUMNS = ["latents/demo-32", "text/tiny@source", "text/tiny@long"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """6 shards; rows 3 and 7 of each are bad in one column or another."""
    return build_corpus(
        tmp_path_factory.mktemp("corpus"),
        failed={"latents/demo-32": (3,), "latents/demo-64": (3,), "text/tiny@long": (7,)},
    )


def rows_by_shard(index: SampleIndex) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i in range(len(index)):
        found.setdefault(index.shards[index.shard[i]][1], []).append(int(index.row[i]))
    return found


def test_rows_ok_in_every_column_are_kept(corpus: Corpus) -> None:
    index, missing = index_samples(corpus, newest_commits(corpus, COLUMNS))
    expected = [row for row in range(16) if row not in (3, 7)]
    assert rows_by_shard(index) == {f"art-{u:06d}-{s:02d}": expected for u in range(2) for s in range(3)}
    assert missing == 0


def test_only_the_columns_asked_for_decide(corpus: Corpus) -> None:
    index, _ = index_samples(corpus, newest_commits(corpus, COLUMNS[:2]))
    assert len(index) == 6 * 15


def selection_table(rows: list[tuple[str, int]], weight: float = 1.0) -> pa.Table:
    return pa.table(
        {
            "source": ["art"] * len(rows),
            "shard": [shard for shard, _ in rows],
            "row": pa.array([row for _, row in rows], pa.int32()),
            "weight": pa.array([weight] * len(rows), pa.float32()),
        }
    )


@pytest.fixture
def select(monkeypatch: pytest.MonkeyPatch):
    """Make `selected_rows` give those of a table; that it reads what `select` wrote is tested with the demo."""
    from microdit.pipeline.selection import selections
    from microdit.pipeline.selection.chosen_rows import rows_by_shard

    def use(table: pa.Table) -> None:
        monkeypatch.setattr(selections, "selected_rows", lambda corpus, name: rows_by_shard([table]))

    return use


def test_selection_keeps_its_rows_and_counts_those_that_are_not_there(corpus: Corpus, select) -> None:
    a, b, gone = "art-000000-01", "art-000001-02", "art-000009-00"
    select(selection_table([(a, 0), (a, 3), (a, 5), (b, 7), (b, 15), (gone, 2)]))
    index, missing = index_samples(corpus, newest_commits(corpus, COLUMNS), "good")
    assert rows_by_shard(index) == {a: [0, 5], b: [15]}
    assert missing == 3


def test_weights_of_a_selection_and_of_sources(corpus: Corpus, select) -> None:
    columns = newest_commits(corpus, ["latents/demo-32"])
    select(selection_table([("art-000000-01", 0), ("art-000000-01", 2)], weight=0.5))
    index, _ = index_samples(corpus, columns, "some")
    assert index.weight is None  # all alike
    table = selection_table([("art-000000-00", 1), ("art-000000-01", 0), ("art-000000-01", 3), ("art-000000-02", 2)])
    select(table.set_column(3, table.schema.field("weight"), pa.array([1, 2, 9, 0.5], pa.float32())))
    index, missing = index_samples(corpus, columns, "some")
    assert index.weight is not None and missing == 1  # row 3 is broken
    assert index.weight.tolist() == [1, 2, 0.5] and index.take(np.array([2, 1])).weight.tolist() == [0.5, 2]
    assert index.digest != replace(index, weight=None).digest
    assert index.mixed({"art": 2}).weight.tolist() == [2, 4, 1]
    two = SampleIndex([("a", "s"), ("b", "t")], np.array([0, 0, 1], np.int32), np.arange(3, dtype=np.int32))
    assert two.mixed({"b": 3}).weight.tolist() == [1, 1, 3] and two.mixed({"a": 2, "b": 2}).weight is None
    with pytest.raises(RequestError, match="mix: there is no sample of c; the sources are a, b"):
        two.mixed({"c": 1})


def test_a_sidecar_that_is_lost_is_named(tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=1)
    (commit,) = corpus.commits("latents/demo-32")
    (tmp_path / "c" / commit.sidecar.name).unlink()
    with pytest.raises(RequestError, match=r"latents/demo-32, shard art-000000-00: .*missing or damaged.*verify"):
        index_samples(corpus, newest_commits(corpus, ["latents/demo-32"]))


@pytest.mark.parametrize("rows", [[], [("art-000000-01", 3)]])
def test_selection_that_leaves_nothing_is_refused(corpus: Corpus, select, rows) -> None:
    select(selection_table(rows))
    with pytest.raises(RequestError, match="selection good has no sample"):
        index_samples(corpus, newest_commits(corpus, COLUMNS), "good")


def test_unknown_and_empty_columns_are_refused(corpus: Corpus) -> None:
    with pytest.raises(RequestError, match=r"column 'latents/other'.*latents/demo-32"):
        newest_commits(corpus, ["latents/other"])
    corpus.declare_column("latents/empty-32", {"stage": "latents"})
    with pytest.raises(RequestError, match=r"latents/empty-32.*no shard"):
        newest_commits(corpus, ["latents/empty-32"])


def test_stale_lineage_is_refused_at_any_depth(tmp_path) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=2)
    ref = ShardRef(source="art", unit="art-000000", shard="art-000000-01")
    newest_commits(corpus, COLUMNS)
    images = write_shard(corpus, "images", ref, [], generation=1)
    with pytest.raises(
        RequestError, match=r"latents/demo-32, shard art-000000-01.*generation 0 of images.*generation 1"
    ):
        newest_commits(corpus, ["latents/demo-32"])
    # the text itself was made from the captions there are, but those were not made from these images
    with pytest.raises(RequestError, match=r"captions/source, shard art-000000-01"):
        newest_commits(corpus, ["text/tiny@source"])
    write_shard(corpus, "latents/demo-32", ref, [images], generation=1)
    found = newest_commits(corpus, ["latents/demo-32"])
    assert found["latents/demo-32"][("art", "art-000000-01")].generation == 1


def test_digest_names_the_samples() -> None:
    def index(shards, shard, row):
        return SampleIndex([("art", s) for s in shards], np.array(shard, np.int32), np.array(row, np.int32))

    base = index(["a", "b"], [0, 0, 1], [1, 2, 1])
    assert base.digest == index(["a", "b", "c"], [0, 0, 1], [1, 2, 1]).digest  # a shard without samples says nothing
    others = [index(["a", "b"], [0, 1, 1], [1, 2, 1]), index(["a", "b"], [0, 0, 1], [1, 3, 1])]
    others += [index(["a", "x"], [0, 0, 1], [1, 2, 1]), index(["a", "b"], [0, 0], [1, 2])]
    assert len({base.digest, *(o.digest for o in others)}) == 5


@settings(deadline=None)
@given(
    hashes=st.lists(st.integers(0, 6), max_size=30).map(lambda values: np.array(values, np.uint64)),
    count=st.integers(0, 32),
)
def test_the_lowest_hashes_are_those_of_a_stable_sort(hashes: np.ndarray, count: int) -> None:
    assert lowest(hashes, count).tolist() == sorted(np.argsort(hashes, kind="stable")[:count].tolist())
