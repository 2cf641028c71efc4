"""More like this, and pictures by a text: against all cosines computed, and with a small CLIP."""

from pathlib import Path

import numpy as np
import pytest

from microdit.model.pretrained.vision import load_vision_model, vision_fingerprint
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.explore.similar import build_index
from microdit.pipeline.tables.sample_table import sample_table
from tests.model.pretrained.vision_models import clip_model
from tests.pipeline.explore.serving import served
from tests.pipeline.helpers.small_corpus import SOURCE, fill, make_corpus

COLUMN = "scores/embedding"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return clip_model(tmp_path_factory.mktemp("models") / "small-clip")


@pytest.fixture
def corpus(tmp_path: Path, model: str) -> Corpus:
    """Three units with embeddings of unit length, as many numbers wide as the model's."""
    made = make_corpus(tmp_path / "corpus")
    made.declare_column(COLUMN, {"stage": COLUMN, "name": model, "model": vision_fingerprint(model, "embed")})
    fill(made, units=3)
    width = load_vision_model(model, "compare").read(["a"]).shape[1]
    rng = np.random.default_rng(0)
    for images in made.commits("images"):
        with begin_attempt(made, COLUMN, images.ref, [images]) as attempt:
            for line in made.sidecar(images).to_pylist():
                if line["status"] == "failed":
                    attempt.fail(line["row"], line["key"], "upstream", "images")
                    continue
                vector = rng.standard_normal(width)
                vector = (vector / np.linalg.norm(vector)).astype(np.float16)
                attempt.add(line["row"], line["key"], {"npy": array_bytes(vector)})
            attempt.commit()
    return made


def stored(corpus: Corpus) -> dict[tuple[str, int], np.ndarray]:
    """All vectors, by shard and row."""
    from microdit.pipeline.curation.semantic import read_vectors

    found = {}
    for commit in corpus.commits(COLUMN):
        for row, vector in zip(*read_vectors(corpus, commit), strict=True):
            found[commit.shard, int(row)] = vector.astype(np.float32)
    return found


def nearest(vectors: dict[tuple[str, int], np.ndarray], wanted: np.ndarray) -> list[tuple[str, int]]:
    return sorted(vectors, key=lambda at: -float(vectors[at] @ wanted / np.linalg.norm(wanted)))


def test_more_like_this_and_by_a_text(corpus: Corpus, model: str) -> None:
    vectors = stored(corpus)
    with served(corpus) as server:
        about = server.get("corpus")
        assert about["embeddings"] == [COLUMN] and about["text_search"]
        row = server.get("rows", where="status = 'ok'")["rows"][7]
        found = server.get("similar", source=SOURCE, key=row["key"], limit=5)
        at = (row["shard"], row["row"])
        wanted = [other for other in nearest(vectors, vectors[at]) if other != at][:5]
        assert [(one["shard"], one["row"]) for one in found["rows"]] == wanted and found["note"] is None
        assert found["rows"][0]["score"] == pytest.approx(float(vectors[wanted[0]] @ vectors[at]), abs=2e-3)
        found = server.get("search", text="a red apple", limit=5)
        text = load_vision_model(model, "compare").read(["a red apple"])[0]
        assert [(one["shard"], one["row"]) for one in found["rows"]] == nearest(vectors, text)[:5]
        assert "is missing" in server.refused("search", text="")
        assert "failed" in server.refused("similar", source=SOURCE, key="demo-000000-00-2")


def test_more_vectors_than_may_be_held_are_sampled_and_that_is_said(corpus: Corpus) -> None:
    names = sample_table(corpus).names
    whole = build_index(corpus, names, COLUMN)
    assert whole.note is None and len(whole.shards) == 6 and len(whole.row) == 30
    part = build_index(corpus, names, COLUMN, most=3 * 5 * 2 * whole.index.d)
    assert len(part.shards) == 3 and part.note == f"of a sample: 15 embeddings, 3 of 6 shards of {COLUMN}"
