"""`status` of corpora that are whole, unfinished or partly given up."""

import json
from pathlib import Path

import pytest

from microdit.pipeline.corpus import attempt
from microdit.pipeline.corpus.attempt import commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import write_failure
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.upkeep.status import status
from tests.pipeline.helpers.small_corpus import (
    COLUMNS,
    LATENTS,
    NEXT,
    REF,
    SHARD_SAMPLES,
    SOURCE,
    fill,
    make_corpus,
    write_column,
    write_images,
)


def test_status(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=2, columns=["captions/source"])
    write_column(corpus, LATENTS, {"images": corpus.commits("images")[0]})
    write_failure(corpus, LATENTS, SOURCE, NEXT.shard, stage="latents:demo", attempts=3, message="no", traceback="...")
    write_failure(corpus, LATENTS, SOURCE, REF.shard, stage="latents:demo", attempts=3, message="old", traceback="...")
    write_failure(corpus, "units", SOURCE, "demo-000007", stage="ingest", attempts=3, message="gone", traceback="...")
    found = json.loads(json.dumps(status(corpus).to_dict()))
    assert found["sources"] == {SOURCE: {"units": None, "units_done": 1, "inputs": 2 * SHARD_SAMPLES}}
    assert found["columns"].keys() == {"images", *COLUMNS}
    images, latents = found["columns"]["images"][SOURCE], found["columns"][LATENTS][SOURCE]
    assert (images["done"], images["left"], images["in"], images["out"], images["failed"]) == (2, None, 12, 10, 2)
    assert images["reasons"] == {"http_404": 2}
    commits = corpus.commits("images")
    assert images["bytes"] == sum(commit.object.size + commit.sidecar.size for commit in commits)
    assert images["seconds"] == pytest.approx(sum(commit.timings["seconds"] for commit in commits))
    assert images["rate"] == pytest.approx(12 / images["seconds"], rel=1e-3)
    assert (latents["done"], latents["left"], latents["set_aside"], latents["stale"]) == (1, 1, 1, 0)
    nothing = found["columns"]["scores/basic"][SOURCE]
    assert (nothing["done"], nothing["left"], nothing["rate"], nothing["bytes"]) == (0, 2, None, 0)
    assert [(item["column"], item["shard"], item["message"]) for item in found["set_aside"]] == [
        (LATENTS, NEXT.shard, "no"),
        ("units", "demo-000007", "gone"),
    ]


def test_status_says_how_many_gpus_worked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path)
    worked = [("NVIDIA H200", "one"), ("NVIDIA H200", "two"), ("NVIDIA H200", "one"), ("cpu", "")]
    for number, found in enumerate(worked):
        monkeypatch.setattr(attempt, "_device", lambda found=found: found)
        ref = ShardRef(source=SOURCE, unit=unit_name(SOURCE, number), shard=shard_name(unit_name(SOURCE, number), 0))
        write_column(corpus, LATENTS, {"images": write_images(corpus, ref)})
    assert status(corpus).to_dict()["devices"] == {LATENTS: {"NVIDIA H200": 2}}


def test_status_says_when_no_images_are_left(tmp_path: Path) -> None:
    corpus = Corpus.create(tmp_path, "x", SHARD_SAMPLES)
    corpus.declare_column("images", {}, {})
    corpus.declare_source("demo", {"units": 2})
    assert status(corpus).columns["images"]["demo"].left is None
    for number in range(2):
        commit_unit(corpus, "demo", unit_name("demo", number), 0, [])
    assert status(corpus).columns["images"]["demo"].left == 0
