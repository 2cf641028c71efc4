"""Latents and text of a small corpus: the numbers, batches, and what is done with what cannot be used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.model.pretrained.text import load_text_encoder
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.content.crop import square
from microdit.pipeline.content.images import resize
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.stages.encoding import Batches
from microdit.pipeline.stages.identity import autoencoder_identity
from microdit.pipeline.stages.registry import stages_of
from microdit.pipeline.stages.stage import Task, seed_of
from tests.pipeline.helpers.stage_outputs import (
    CAPTIONS,
    SHARD,
    arrays,
    autoencoder,
    check_rows,
    config,
    corpus,
    lines,
    make,
    photo,
    start,
)

__all__ = ["autoencoder", "corpus"]


# -- latents ---------------------------------------------------------------------------------------------------------
def test_latents_of_two_resolutions(corpus: Corpus, autoencoder: str):
    columns = {f"latents/tiny-{side}": {"autoencoder": autoencoder, "resolution": side} for side in (32, 64)}
    stages = stages_of(config(Path(corpus.url), columns))
    assert [(s.name, sorted(s.columns), s.device) for s in stages] == [
        ("latents", ["latents/tiny-32", "latents/tiny-64"], "gpu")
    ]
    made = make(corpus, columns, resources={"latents_batch": 4})
    model = load_autoencoder(autoencoder)
    for column, side in (("latents/tiny-32", 32), ("latents/tiny-64", 64)):
        check_rows(corpus, made[column], "images")
        found = arrays(corpus, made[column])
        assert list(found) == [f"k{i}" for i in range(12) if i not in (2, 4)]
        for i in (0, 3, 11):
            pixels = square(np.array(photo(i, (72 + i, 64 + 3 * i))), side)
            assert pixels.shape == (side, side, 3)
            seed = seed_of(column, "photos", f"k{i}")
            wanted = model.encode(pixels[None].copy(), seeds=[seed])[0].numpy()
            assert found[f"k{i}"].dtype == np.float16
            assert found[f"k{i}"].shape == (4, side // 8, side // 8)
            assert np.abs(found[f"k{i}"] - wanted).max() < 2e-3 * np.abs(wanted).max()
        absmax = {line["key"]: line["absmax"] for line in lines(corpus, made[column])}
        assert absmax["k0"] == np.abs(found["k0"]).max()
        assert absmax["k2"] is None
        assert made[column][0].timings["batch"] == 4


def test_one_column_of_a_stage_alone(corpus: Corpus, autoencoder: str):
    columns = {f"latents/tiny-{side}": {"autoencoder": autoencoder, "resolution": side} for side in (32, 64)}
    both = make(corpus, columns)
    other = start(Path(corpus.url).parent / "other")
    [stage] = stages_of(config(Path(other.url), columns))
    for column, spec in stage.columns.items():
        other.declare_column(column, spec.stage, spec.scalars)
    ref = other.commits("images")[0].ref
    [alone] = stage.run(other, Task(ref, {"latents/tiny-64": 0}))
    assert alone.object.sha256 == both["latents/tiny-64"][0].object.sha256  # the same bytes, made again
    assert other.committed("latents/tiny-32") == {}


def test_the_posterior_is_drawn_by_key_and_column(corpus: Corpus, autoencoder: str):
    options = {"autoencoder": autoencoder, "resolution": 32}
    made = make(
        corpus,
        {"latents/a": options, "latents/b": options, "latents/mean": {**options, "posterior": "mode"}},
    )
    a, b, mean = (arrays(corpus, made[f"latents/{name}"])["k0"] for name in ("a", "b", "mean"))
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, mean)
    seeds = {seed_of(c, s, k) for c in ("x", "y") for s in ("s", "t") for k in ("1", "2")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_other_batches_give_the_same_numbers_but_for_the_last_bits(corpus: Corpus, autoencoder: str, tmp_path: Path):
    columns = {"latents/a": {"autoencoder": autoencoder, "resolution": 64}}
    found = []
    for batch in (1, 3, 16):
        root = start(tmp_path / f"batch{batch}")
        found.append(arrays(root, make(root, columns, resources={"latents_batch": batch})["latents/a"]))
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for key in found[0]:
        for other in found[1:]:
            assert np.abs(other[key] - found[0][key]).max() <= 4e-3 * np.abs(found[0][key]).max()


def test_latents_that_are_no_numbers_are_not_written(corpus: Corpus, autoencoder: str, tmp_path: Path):
    broken = AutoencoderKL.from_pretrained(autoencoder)
    with torch.no_grad():
        broken.quant_conv.weight.mul_(1e9)
    broken.save_pretrained(tmp_path / "broken")
    columns = {"latents/x": {"autoencoder": str(tmp_path / "broken"), "resolution": 32, "posterior": "mode"}}
    made = make(corpus, columns)["latents/x"]
    check_rows(corpus, made, "images")
    assert {line["reason"] for line in lines(corpus, made)} == {"upstream", "not_finite"}
    assert arrays(corpus, made) == {}


def test_the_demo_autoencoder(corpus: Corpus):
    made = make(corpus, {"latents/demo-64": {"autoencoder": "demo", "resolution": 64}})["latents/demo-64"]
    assert {array.shape for array in arrays(corpus, made).values()} == {(4, 8, 8)}


def test_squares_are_the_middle():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert (square(wide, 20) == 255).all()
    assert (square(wide.transpose(1, 0, 2), 20) == 255).all()
    assert square(photo_array := np.asarray(photo(0, (40, 40))), 40) is not photo_array
    assert (square(photo_array, 40) == photo_array).all()
    assert (square(photo_array, 16) == resize(photo_array, (16, 16))).all()
    assert square(np.zeros((9, 500, 3), np.uint8), 64).shape == (64, 64, 3)


def test_a_model_that_cannot_be_used_is_a_request_error(tmp_path: Path, autoencoder: str):
    for options, words in (
        ({"autoencoder": "no-such-model", "resolution": 64}, r"columns\.latents/x\.autoencoder = 'no-such-model'"),
        ({"autoencoder": str(tmp_path), "resolution": 64}, "config.json"),
        ({"autoencoder": "demo", "resolution": 64, "revision": "main"}, "revision"),
    ):
        with pytest.raises(RequestError, match=words):
            stages_of(config(tmp_path, {"latents/x": options}))
    [stage] = stages_of(config(tmp_path, {"latents/x": {"autoencoder": autoencoder, "resolution": 60}}))
    with pytest.raises(RequestError, match=r"columns\.latents/x\.resolution = 60.*multiples of 8"):
        stage.load()


def test_weights_are_part_of_what_a_column_is_made_by(tmp_path: Path, autoencoder: str):
    def made_by() -> dict:
        autoencoder_identity.cache_clear()
        column = {"latents/x": {"autoencoder": str(tmp_path / "copy"), "resolution": 64}}
        return stages_of(config(tmp_path, column))[0].columns["latents/x"].stage

    model = AutoencoderKL.from_pretrained(autoencoder)
    model.save_pretrained(tmp_path / "copy")
    before = made_by()
    assert before == made_by()
    with torch.no_grad():
        model.quant_conv.bias.add_(1)
    model.save_pretrained(tmp_path / "copy")
    assert {name for name, value in made_by().items() if value != before[name]} == {"model"}


# -- text ------------------------------------------------------------------------------------------------------------
def test_text_of_captions(corpus: Corpus):
    columns = {"captions/source": {}, "text/minilm@source": {"encoder": "minilm"}}
    made = make(corpus, columns, resources={"text_batch": 3})
    check_rows(corpus, made["text/minilm@source"], "captions/source")
    found = arrays(corpus, made["text/minilm@source"])
    encoder = load_text_encoder("minilm")
    keys = [f"k{i}" for i in range(12) if i not in (2, 4) and CAPTIONS[i % SHARD]]
    assert list(found) == keys  # in row order, whatever the batches
    tokens = {line["key"]: line["tokens"] for line in lines(corpus, made["text/minilm@source"])}
    for key in keys:
        embeddings, lengths = encoder.encode([CAPTIONS[int(key[1:]) % SHARD]])
        assert found[key].dtype == np.float16
        assert found[key].shape == (int(lengths[0]), 384) == (tokens[key], 384)
        assert np.abs(found[key] - embeddings[0].numpy()).max() < 5e-3


def test_text_is_the_same_when_made_again(tmp_path: Path):
    columns = {"captions/source": {}, "text/minilm@source": {"encoder": "minilm"}}
    hashes = []
    for name in ("one", "two"):
        corpus = start(tmp_path / name)
        hashes.append([c.object.sha256 for c in make(corpus, columns)["text/minilm@source"]])
    assert hashes[0] == hashes[1]


# -- batches ---------------------------------------------------------------------------------------------------------
def test_a_batch_that_the_gpu_has_no_room_for_is_halved_for_good():
    sizes = []

    def encode(samples, size):
        sizes.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [10 * sample for sample in samples]

    batches = Batches(16)
    assert batches.run(encode, list(range(7))) == [0, 10, 20, 30, 40, 50, 60]
    assert sizes == [16, 8, 4, 2, 2, 2, 2]
    assert batches.run(encode, [1]) == [10]
    assert batches.size == 2

    def never(samples, size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        batches.run(never, [1, 2, 3])
    assert batches.size == 1


def test_an_error_in_a_batch_is_the_samples_that_causes_it():
    def encode(samples, size):
        if 5 in samples:
            raise ValueError("five")
        return [-sample for sample in samples]

    found = Batches(4).run(encode, [3, 4, 5, 6, 7])
    assert found[:2] + found[3:] == [-3, -4, -6, -7]
    assert isinstance(found[2], ValueError)

    def broken(samples, size):
        raise ValueError("it is not the samples")

    with pytest.raises(ValueError, match="not the samples"):
        Batches(4).run(broken, [1, 2])


def test_a_trial_of_some_rows_commits_nothing_and_rows_set_aside_fail(corpus: Corpus, autoencoder: str):
    columns = {
        "captions/source": {},
        "scores/basic": {},
        "latents/x": {"autoencoder": autoencoder, "resolution": 32},
        "text/minilm@source": {"encoder": "minilm"},
    }
    made = {}
    ref = corpus.commits("images")[0].ref
    for stage in stages_of(config(Path(corpus.url), columns)):
        for column, spec in stage.columns.items():
            corpus.declare_column(column, spec.stage, spec.scalars)
        wanted = dict.fromkeys(stage.columns, 0)
        assert stage.run(corpus, Task(ref, wanted, rows=range(2, 5))) == []
        assert stage.run(corpus, Task(ref, wanted, rows=range(0))) == []
        for commit in stage.run(corpus, Task(ref, wanted, aside={0: "crash", 3: "stall"})):
            made[commit.column] = commit
    assert made.keys() == columns.keys()
    assert not list(corpus.store.unfinished())
    for column, commit in made.items():
        assert len(list(corpus.store.list(f"{column}/photos"))) == (1 if commit.object == commit.sidecar else 2)
        reasons = [line["reason"] for line in lines(corpus, [commit])]
        inherited = column == "text/minilm@source"
        assert (reasons[0], reasons[3]) == (("upstream", "upstream") if inherited else ("crash", "stall"))
        assert commit.counts["in"] == SHARD
