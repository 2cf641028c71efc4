"""The sample table: its lines, its cache, and what makes another one."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.selection.view import query
from microdit.pipeline.storage.store import open_store
from microdit.pipeline.tables.sample_table import sample_table
from tests.pipeline.helpers.small_corpus import (
    FAILED,
    SHARD_SAMPLES,
    SOURCE,
    fill,
    make_corpus,
    write_column,
    write_images,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    """Two units of two shards with all columns; for tests that only read."""
    made = make_corpus(tmp_path_factory.mktemp("samples") / "corpus")
    fill(made, units=2)
    yield made


def _count(corpus: Corpus, condition: str) -> int:
    return int(query(corpus, f"SELECT count(*) AS n FROM samples WHERE {condition}")["n"][0].as_py())


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
    second = sample_table(corpus, reads=None)
    assert _count(corpus, "status = 'ok'") == _count(corpus, "true") == SHARD_SAMPLES
    write_column(corpus, "latents/demo-64", {"images": newer})
    third = sample_table(corpus, reads=None)
    corpus.declare_column("scores/more", {"stage": "scores"}, {"x": "float32"})
    fourth = sample_table(corpus, reads=None)
    assert first.parts["images", ""] != second.parts["images", ""] == third.parts["images", ""]
    assert second.parts.keys() < third.parts.keys()
    assert third == fourth  # nothing is committed in the new column
    assert "more_x" in query(corpus, "SELECT * FROM samples LIMIT 0").column_names
    assert third.names == sorted(
        [
            "commits/captions/source/demo/demo-000000-00.0.json",
            "commits/images/demo/demo-000000-00.1.json",
            "commits/latents/demo-64/demo/demo-000000-00.0.json",
        ]
    )


def test_the_cache_may_be_deleted_at_any_time(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1, columns=[])
    table = sample_table(corpus)
    corpus.store.delete([table.parts["images", ""][0].name])
    assert _count(corpus, "status = 'ok'") == SHARD_SAMPLES - 1
    assert sample_table(corpus) == table and corpus.store.exists(table.parts["images", ""][0].name)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    path = tmp_path / sample_table(corpus).parts["images", ""][0].name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RequestError, match=r"tables/samples/.* is damaged .*; remove the folder tables/samples"):
        query(corpus, "SELECT status FROM samples")


def test_several_may_make_the_table_at_once(corpus_url: str) -> None:
    fill(make_corpus(corpus_url), shards=2, columns=[])
    barrier = threading.Barrier(3)

    def make(_: int) -> str:
        corpus = Corpus.open(corpus_url)
        barrier.wait(60)
        return sample_table(corpus).parts["images", ""][0].name

    with ThreadPoolExecutor(3) as pool:
        names = set(pool.map(make, range(3)))
    assert len(names) == 1 and set(open_store(corpus_url).names("tables/samples")) == names


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
        query(corpus, "SELECT basic_sharpness FROM samples")
