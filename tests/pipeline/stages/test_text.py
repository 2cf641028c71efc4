"""Text columns that are quantised or trimmed, on the small corpus of the other stages."""

import json
from collections.abc import Generator
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset

from microdit.model.loading import trained_part
from microdit.model.pretrained.text import load_text_encoder
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import load_config
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.quantised import dequantise
from microdit.pipeline.corpus.shard_cache import ShardCache
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.upkeep.ls import ls
from microdit.pipeline.upkeep.verify import verify
from microdit.trainer.data.batch import pad_text
from tests.model.pretrained.text_models import clip_files
from tests.pipeline.helpers.stage_outputs import CAPTIONS, lines, make, start


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Generator[Corpus]:
    """One with a text column as the encoder gives it."""
    corpus = start(tmp_path_factory.mktemp("text") / "corpus")
    make(corpus, {"captions/source": {}, "text/minilm@source": {"encoder": "minilm"}})
    yield corpus


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    clip_files(folder)
    return str(folder)


def read(corpus: Corpus, column: str, extension: str) -> dict[str, np.ndarray]:
    found = {}
    for commit in corpus.commits(column):
        with corpus.open_object(commit) as file:
            for key, members in read_tar(file):
                assert list(members) == [extension]
                found[key] = array_from_bytes(members[extension])
    return found


@pytest.mark.parametrize(("storage", "bound"), [("int8", 0.03), ("int4", 0.2)])
def test_a_quantised_column_is_the_other_one_but_for_its_loss(corpus: Corpus, storage: str, bound: float):
    column = f"text/minilm-{storage}@source"
    made = make(corpus, {"captions/source": {}, column: {"encoder": "minilm", "storage": storage}})
    exact, found = read(corpus, "text/minilm@source", "npy"), read(corpus, column, "npz")
    assert exact.keys() == found.keys()
    for key, embedding in exact.items():
        assert found[key].dtype == np.float16
        assert found[key].shape == embedding.shape
        difference = np.linalg.norm(found[key].astype(float) - embedding) / np.linalg.norm(embedding.astype(float))
        assert 1e-4 < difference < bound
    for commit in made[column]:
        timings = commit.timings
        assert timings["compared"] == 1  # of eight
        assert 0.9 < timings["cosine_worst"] <= timings["cosine_mean"] < 1
        assert 0 < timings["error_mean"] <= timings["error_worst"] < 2 * bound
    tokens = {line["key"]: line["tokens"] for line in lines(corpus, made[column]) if line["status"] == "ok"}
    assert tokens == {key: len(embedding) for key, embedding in exact.items()}
    assert verify(corpus).problems == []


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_stock_libraries_decode_it(corpus: Corpus, storage: str, tmp_path: Path):
    column = f"text/minilm-{storage}-stock@source"
    make(corpus, {"captions/source": {}, column: {"encoder": "minilm", "storage": storage}})
    urls, ours = list(ls(corpus, column)), read(corpus, column, "npz")
    integers = "q" if storage == "int8" else "q4"
    by_webdataset = {
        sample["__key__"]: sample["npz"] for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()
    }
    loaded = datasets.load_dataset("webdataset", data_files={"train": urls}, split="train", cache_dir=str(tmp_path))
    by_datasets = {sample["__key__"]: sample["npz"] for sample in loaded}
    assert by_webdataset.keys() == by_datasets.keys() == ours.keys()
    for key, embedding in ours.items():
        for found in (by_webdataset[key], by_datasets[key]):
            arrays = {
                integers: np.asarray(found[integers], np.int8 if integers == "q" else np.uint8),
                "scale": np.asarray(found["scale"], np.float16),
            }
            assert np.array_equal(dequantise(arrays), embedding)


def test_the_trainer_reads_it(corpus: Corpus):
    column = "text/minilm-read@source"
    make(corpus, {"captions/source": {}, column: {"encoder": "minilm", "storage": "int8"}})
    commits = {(c.source, c.shard): c for c in corpus.commits(column)}
    cache = ShardCache(corpus, {column: commits}, 1 << 20)
    found = read(corpus, column, "npz")
    for where, commit in commits.items():
        for line in lines(corpus, [commit]):
            if line["status"] == "ok":
                padded, mask = pad_text([cache.field(column, where, line["row"])], [32])
                assert np.array_equal(padded[0, mask[0]].numpy(), found[line["key"]])
    cache.close()


def test_a_loss_beyond_its_bound_stops_the_build(corpus: Corpus):
    column = "text/minilm-lossy@source"
    options = {"encoder": "minilm", "storage": "int4", "max_loss": 0.001}
    with pytest.raises(RequestError, match=r"storage = 'int4': sample photos/k\d+ loses .* at most 0.001"):
        make(corpus, {"captions/source": {}, column: options})
    assert corpus.commits(column) == []


def test_the_bound_is_no_part_of_what_a_column_is(corpus: Corpus):
    column = "text/minilm-bound@source"
    for more in ({}, {"max_loss": 0.5}):
        make(corpus, {"captions/source": {}, column: {"encoder": "minilm", "storage": "int4", **more}})
    with pytest.raises(RequestError, match="storage: the corpus has 'int4', the config says 'int8'"):
        make(corpus, {"captions/source": {}, column: {"encoder": "minilm", "storage": "int8"}})


def test_a_clip_tower_without_its_padding(corpus: Corpus, clip: str):
    columns = {"captions/source": {}, "text/clip@source": {"encoder": clip}}
    columns["text/trimmed@source"] = {"encoder": clip, "trim": True}
    columns["text/small@source"] = {"encoder": clip, "trim": True, "storage": "int8"}
    make(corpus, columns)
    whole, trimmed = read(corpus, "text/clip@source", "npy"), read(corpus, "text/trimmed@source", "npy")
    small = read(corpus, "text/small@source", "npz")
    words = {f"k{i}": CAPTIONS[i % len(CAPTIONS)] for i in range(12)}
    for key, embedding in trimmed.items():
        assert len(whole[key]) == 77
        assert len(words[key].split()) + 2 <= len(embedding) < 77
        # float32 towers: other lengths move the last bits
        assert np.abs(whole[key][: len(embedding)] - embedding).max() <= 2e-3
        assert np.abs(small[key].astype(float) - embedding).max() < 0.05


def test_generation_trims_as_the_column_did(corpus: Corpus, clip: str):
    make(corpus, {"captions/source": {}, "text/again@source": {"encoder": clip, "trim": True}})
    part = trained_part(json.loads(json.dumps(corpus.column("text/again@source").made_by)), "encoder")
    encoder = load_text_encoder(part.where, **part.options)
    assert encoder.fingerprint == part.trained_with
    assert encoder.encode(["x"])[1].tolist() == [3]


def test_trim_is_for_clip_alone(corpus: Corpus):
    with pytest.raises(RequestError, match=r"encoder = 'minilm': trim: .* is no CLIP text tower"):
        make(corpus, {"captions/source": {}, "text/m@source": {"encoder": "minilm", "trim": True}})


def test_a_bound_without_quantising_is_refused(tmp_path: Path):
    file = tmp_path / "corpus.yaml"
    file.write_text(
        "name: n\ncorpus: c\nsources: {s: {adapter: urls, list: x}}\n"
        "columns: {captions/a: {}, text/t@a: {encoder: minilm, max_loss: 0.1}}\n"
    )
    with pytest.raises(RequestError, match=r"columns.text/t@a.max_loss = 0.1: it is for storage int8 and int4"):
        load_config(file)
