"""Embeddings that are near: against every pair compared, and the table job on a corpus of real pictures."""

import json
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.curation import semantic
from microdit.pipeline.curation.duplicates import dedup
from microdit.pipeline.curation.greedy import nearest_kept
from microdit.pipeline.curation.hamming import Forest
from microdit.pipeline.curation.semantic import dedup_semantic, groups, similar
from microdit.pipeline.selection.selections import load_selection, select
from microdit.pipeline.selection.view import query
from microdit.pipeline.stages.scores.pixels import basic_score_stage
from tests.pipeline.helpers.picture_corpus import microdit, photo, write
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS, SOURCE

UNIT = unit_name(SOURCE, 0)
COLUMN = "scores/embedding"


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float16)


def some_near(seed: int, count: int, near: int, cosine: float, width: int = 32, topics: int = 12) -> np.ndarray:
    """Vectors about some topics; behind them, of the first `near`, others at this cosine."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((topics, width))
    vectors = unit(means[rng.integers(0, topics, count)] + rng.standard_normal((count, width))).astype(np.float64)
    aside = rng.standard_normal((near, width))
    aside -= (aside * vectors[:near]).sum(1, keepdims=True) * vectors[:near]
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    return unit(np.concatenate([vectors, cosine * vectors[:near] + np.sqrt(1 - cosine**2) * aside]))


def by_brute_force(vectors: np.ndarray, similarity: float) -> np.ndarray:
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    forest = Forest(len(vectors))
    forest.join(*np.nonzero(exact @ exact.T >= similarity))
    return forest.labels()


# -- comparing ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("similarity", [0.9, 0.97])
def test_one_cluster_is_compared_whole(similarity: float) -> None:
    vectors = some_near(1, 900, 100, similarity + 0.003)
    labels, clusters, cut = groups(vectors, similarity)
    assert (clusters, cut) == (1, 0)
    assert np.array_equal(labels, by_brute_force(vectors, similarity))
    assert np.array_equal(labels[900:], labels[:100])


def test_many_clusters_lose_little_and_say_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "CLUSTER", 100)
    vectors = some_near(2, 4000, 400, 0.96)
    labels, clusters, cut = groups(vectors, 0.95)
    assert (clusters, cut) == (44, 0)
    assert (labels[4000:] == labels[:400]).mean() >= 0.98
    truth = by_brute_force(vectors, 0.95)
    assert np.array_equal(truth[labels], truth)  # what is together belongs together
    assert np.array_equal(groups(vectors, 0.95)[0], labels)


def test_a_large_cluster_is_bounded_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of nearly the same, and what is not near them loses nothing."""
    monkeypatch.setattr(semantic, "CLUSTER", 200)
    monkeypatch.setattr(semantic, "LARGEST", 128)
    rng = np.random.default_rng(3)
    white = unit(rng.standard_normal(32) + 0.01 * rng.standard_normal((700, 32)))
    vectors = np.concatenate([white, some_near(3, 600, 50, 0.97)])
    labels, clusters, cut = groups(vectors, 0.95)
    assert clusters > 1 and cut >= 700
    assert set(labels[:700].tolist()) == {0}
    assert (labels[1300:] == labels[700:750]).mean() >= 0.98


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_vectors(count: int) -> None:
    labels, _, cut = groups(unit(np.ones((count, 4))), 1 - 1e-3)
    assert (labels.tolist(), cut) == ([0] * count, 0)


@st.composite
def walks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of which each is a step from the one before it, so that they link to long chains; and areas."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = draw(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 5.0]), max_size=60))
    vectors = [np.eye(6)[0]]
    for step in steps:
        vectors.append(unit(vectors[-1] + step * unit(rng.standard_normal(6)).astype(np.float64)).astype(np.float64))
    order = rng.permutation(len(vectors))
    return unit(np.stack(vectors))[order], rng.integers(1, 4, len(vectors))


@given(walks(), st.sampled_from([0.8, 0.95, 0.99, 1.0]))
@settings(max_examples=100, deadline=None)
def test_what_is_dropped_is_like_what_is_kept_and_what_is_kept_is_unlike(
    made: tuple[np.ndarray, np.ndarray], similarity: float
) -> None:
    vectors, area = made
    keeper = nearest_kept(groups(vectors, similarity)[0], area, partial(similar, vectors, similarity)).keeper
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    cosines = exact @ exact.T
    assert (cosines[np.arange(len(keeper)), keeper] >= similarity - 3e-6).all()
    assert (keeper[keeper] == keeper).all() and (area[keeper] >= area).all()
    kept = np.flatnonzero(keeper == np.arange(len(keeper)))
    assert (cosines[np.ix_(kept, kept)][~np.eye(len(kept), dtype=bool)] < similarity + 3e-6).all()
    for first in kept:  # equal vectors are like each other, whatever is asked for
        assert [int(i) for i in kept if (vectors[i] == vectors[first]).all()] == [first]


# -- the table job -----------------------------------------------------------------------------------------------------
def feature(image: Image.Image) -> np.ndarray:
    """Gray 12 x 12 without its mean, of unit length: blind to size, brightness and contrast."""
    small = np.asarray(image.convert("L").resize((12, 12), Image.Resampling.BOX), np.float32).ravel()
    return unit(small - small.mean())


def embed(
    corpus: Corpus, column: str, images: list[Image.Image | None], vectors: dict[int, np.ndarray] | None = None
) -> None:
    """The column, of the pictures that are there."""
    corpus.declare_column(column, {"stage": "test/gray"})
    ref = ShardRef(source=SOURCE, unit=UNIT, shard=shard_name(UNIT, 0))
    read = corpus.commit("images", SOURCE, ref.shard, 0)
    with begin_attempt(corpus, column, ref, [read]) as attempt:
        for row, image in enumerate(images):
            key = f"{ref.shard}-{row}"
            if image is None:
                attempt.fail(row, key, "upstream", "images: http_404")
            else:
                attempt.add(row, key, {"npy": array_bytes((vectors or {}).get(row, feature(image)))})
        attempt.commit()


def brighter(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(0.6).resize((160, 160))


IMAGES = [photo(1), brighter(photo(1)), None, photo(2), photo(3), photo(2).rotate(1)]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """1 is 0, larger and darker; 2 failed; 5 is 3, turned by a degree; 4 is alone."""
    corpus = Corpus.create(tmp_path / "corpus", "meaning", shard_samples=8)
    corpus.declare_source(SOURCE, {"adapter": "made"})
    corpus.declare_column("images", {"stage": "images"}, IMAGE_SCALARS)
    spec = basic_score_stage("scores/basic", 1 << 24).columns["scores/basic"]
    corpus.declare_column("scores/basic", spec.stage, spec.scalars)
    write(corpus, 0, IMAGES)
    embed(corpus, COLUMN, IMAGES)
    return corpus


def rows(corpus: Corpus, what: str) -> list[dict[str, Any]]:
    return query(corpus, f"SELECT {what} FROM samples ORDER BY shard, row").to_pylist()


def test_the_largest_of_a_group_is_kept(corpus: Corpus) -> None:
    found = dedup_semantic(corpus)
    assert found.to_json() | {"path": ""} == {
        "path": "",
        "column": COLUMN,
        "similarity": 0.95,
        "samples": 5,
        "without_embedding": 0,
        "groups": 2,
        "dropped": 2,
        "kept": 3,
        "clusters": 1,
        "cut": 0,
        "largest": 2,
        "beyond": 0,
    }
    lines = rows(corpus, "semantic_group, semantic_similarity, semantic_keep")
    assert [line["semantic_keep"] for line in lines] == [False, True, None, True, True, False]
    ids = [f"demo/{UNIT}-00-{row}" for row in (1, 3)]
    assert [line["semantic_group"] for line in lines] == [ids[0], ids[0], None, ids[1], None, ids[1]]
    assert lines[1]["semantic_similarity"] == pytest.approx(1, abs=1e-6)
    assert 0.95 <= lines[0]["semantic_similarity"] < 1 and lines[4]["semantic_similarity"] is None
    sql = "SELECT source, shard, row FROM samples WHERE semantic_keep"
    chosen = select(corpus, "once", sql)
    assert load_selection(corpus, f"once@{chosen.hash}")["row"].to_pylist() == [1, 3, 4]
    assert dedup_semantic(corpus) == found  # at once
    dedup(corpus)  # both in one view
    assert [line["duplicate_keep"] for line in rows(corpus, "duplicate_keep, semantic_keep")][2:5] == [None, True, True]
    other = dedup_semantic(corpus, similarity=0.9999)
    assert other.path != found.path and other.groups == 0
    assert select(corpus, "all", sql).rows == 5
    assert [name for name in corpus.store.names("tables/semantic") if name.endswith(".parquet")] == [other.path]


def test_a_new_commit_asks_for_a_new_table_and_shows_what_has_none(corpus: Corpus) -> None:
    dedup_semantic(corpus)
    write(corpus, 1, [photo(1), photo(5)])  # no embedding yet
    with pytest.raises(RequestError, match=r"semantic_keep(.|\n)*`microdit dedup --semantic`, run again"):
        select(corpus, "once", "SELECT source, shard, row FROM samples WHERE semantic_keep")
    found = dedup_semantic(corpus)
    assert (found.samples, found.without_embedding, found.kept) == (5, 2, 3)
    assert [line["semantic_keep"] for line in rows(corpus, "semantic_keep")][-2:] == [None, None]


def test_which_column(corpus: Corpus) -> None:
    embed(corpus, f"{COLUMN}-other", [None if image is None else photo(9) for image in IMAGES])
    with pytest.raises(RequestError, match=r"it has several embeddings; give one of: scores/embedding, scores/embed"):
        dedup_semantic(corpus)
    found = dedup_semantic(corpus, f"{COLUMN}-other")
    assert (found.column, found.groups, found.kept) == (f"{COLUMN}-other", 1, 1)
    assert [line["semantic_keep"] for line in rows(corpus, "semantic_keep")][:3] == [False, True, None]
    with pytest.raises(RequestError, match=r"it has no scores/basic; give one of"):
        dedup_semantic(corpus, "scores/basic")


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (np.full(144, np.nan, np.float16), "row 4 has shape .144,. and length nan"),
        (np.full(144, 0.5, np.float16), "length 6, expected 1"),
        (np.eye(144, dtype=np.float16), "shape .144, 144."),
    ],
)
def test_what_is_no_embedding(corpus: Corpus, vector: np.ndarray, words: str) -> None:
    embed(corpus, f"{COLUMN}-bad", IMAGES, {4: vector})
    with pytest.raises(RequestError, match=f"{COLUMN}-bad/.*{words}.*microdit verify"):
        dedup_semantic(corpus, f"{COLUMN}-bad")


def test_a_damaged_shard_is_one_message(corpus: Corpus) -> None:
    assert corpus.store.root is not None
    path = corpus.store.root / corpus.commit(COLUMN, SOURCE, shard_name(UNIT, 0), 0).object.name
    data = path.read_bytes()
    path.write_bytes(data[:1100])
    with pytest.raises(RequestError, match=r"scores/embedding/.*; run `microdit verify`"):
        dedup_semantic(corpus)


def test_too_little_room(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(1000, 1000 - 99, 99)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(RequestError, match="set TMPDIR to a folder on a larger disk"):
        dedup_semantic(corpus)


# -- the command line --------------------------------------------------------------------------------------------------
def test_the_command(corpus: Corpus) -> None:
    said = microdit("dedup", corpus.url, "--semantic")
    assert said.exit_code == 0, said.output
    assert said.stdout == (
        "2 groups: 3 of 5 samples to keep, 2 to drop; 0 more have no embedding in scores/embedding; "
        "0 to drop are less like what is kept than 0.95; the largest group has 2\n"
    )
    found = json.loads(microdit("dedup", corpus.url, "--semantic", "--similarity", "0.9999", "--json").stdout)
    assert (found["groups"], found["similarity"]) == (0, 0.9999)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--semantic", "--distance", 3), "give --similarity"),
        (("--similarity", 0.9), "give --semantic"),
        (("--semantic", "--similarity", 1.5), "similarity 1.5: expected a cosine above 0"),
        (("--semantic", "--similarity", "nan"), "similarity nan"),
        (("--semantic", "--embedding", "scores/none"), "it has no scores/none; give one of: scores/embedding"),
    ],
)
def test_a_wrong_request_is_one_message(corpus: Corpus, options: tuple[object, ...], words: str) -> None:
    said = microdit("dedup", corpus.url, *options)
    assert said.exit_code == 2
    assert words in said.stderr and "Traceback" not in said.output


def test_no_embeddings_at_all(tmp_path: Path) -> None:
    corpus = Corpus.create(tmp_path / "empty", "empty")
    corpus.declare_column("images", {"stage": "images"}, IMAGE_SCALARS)
    with pytest.raises(RequestError, match=r"it has no scores/embedding; add `scores/embedding`"):
        dedup_semantic(corpus)
