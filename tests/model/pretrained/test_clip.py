"""Equal to open_clip: tokens and text tower, against what the real library gave (`--openclip-dir`: another set)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from microdit.model.pretrained.clip import ClipTokenizer, from_open_clip, open_clip_config, read_merges
from microdit.model.pretrained.text import load_text_encoder
from tests.model.pretrained.openclip_format import DATA, read_tokens, read_tower, weights, write_merges, write_model

TOLERANCE = 2e-5  # float32 against float32; the smallest mistake of those in the facts, gelu for quick_gelu, is 4e-2


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--openclip-dir") or DATA / "openclip")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    merges = tmp_path_factory.mktemp("merges")
    write_merges(merges)
    return ClipTokenizer(read_merges(merges, 49408))


def test_tokens(folder: Path, tokenizer: ClipTokenizer):
    wanted = read_tokens(folder)
    captions = wanted["captions"]
    assert len(captions) == wanted["count"] > 0
    found = (tokenizer.start, tokenizer.end, tokenizer.length, tokenizer.size)
    assert found == (wanted["sot"], wanted["eot"], wanted["context_length"], wanted["vocab_size"])
    ids = tokenizer(caption["text"] for caption in captions)
    assert ids.shape == (len(captions), wanted["context_length"])
    wrong = []
    for caption, row in zip(captions, ids.tolist(), strict=True):
        padded = caption["ids"] + [wanted["pad"]] * (wanted["context_length"] - len(caption["ids"]))
        if row != padded:
            wrong.append((caption["text"], row, padded))
    assert not wrong


def test_whole_captions_are_counted(tokenizer: ClipTokenizer):
    for caption in ("", "a dog", "a dog, " * 3, "word " * 300):
        ids = tokenizer([caption])[0].tolist()
        count = tokenizer.count(caption)
        assert count > 77 if "word" in caption else count == ids.index(tokenizer.end) + 1


def test_text_tower(folder: Path, tmp_path: Path):
    """The whole way: a folder as open_clip publishes it, captions in, embeddings of all positions out."""
    spec, arrays = read_tower(folder)
    assert arrays.keys() == spec["arrays"].keys() == {"input_ids", "ln_final"}
    captions = [read_tokens(folder)["captions"][entry["index_in_tokens"]]["text"] for entry in spec["captions"]]
    encoder = load_text_encoder(write_model(tmp_path / "model", spec), dtype=torch.float32)
    assert np.array_equal(encoder._tokenizer(captions), arrays["input_ids"])
    embeddings, lengths = encoder.encode(captions)
    wanted = arrays["ln_final"]
    assert (encoder.width, encoder.max_tokens) == (wanted.shape[2], wanted.shape[1])
    assert lengths.tolist() == [wanted.shape[1]] * len(captions)
    assert embeddings.shape == wanted.shape
    assert np.abs(embeddings.numpy() - wanted).max() < TOLERANCE


def test_names_of_the_weights(folder: Path):
    spec, _ = read_tower(folder)
    state = weights(spec)
    made = from_open_clip(state)
    listed = [name for entry in spec["mapping"] for name in entry["transformers"]]
    assert sorted(made) == sorted(listed)
    for entry in spec["mapping"]:
        parts = [made[name] for name in entry["transformers"]]
        if parts:
            assert torch.equal(torch.cat(parts), state[entry["open_clip"]]), entry["open_clip"]
    custom = {f"text.{key}": value for key, value in state.items()}  # open_clip's class CustomTextCLIP
    assert all(torch.equal(value, made[name]) for name, value in from_open_clip(custom).items())
    with pytest.raises(ValueError, match="hold no open_clip text tower"):
        from_open_clip({"visual.conv1.weight": torch.zeros(1)})


def test_config(folder: Path):
    spec, _ = read_tower(folder)
    config = open_clip_config({"model_cfg": spec["build"]})
    wanted = {name: value for name, value in spec["transformers_config"].items() if name != "cls"}
    assert {name: config[name] for name in wanted} == wanted
    for odd in ({"hf_model_name": "roberta-base"}, {"no_causal_mask": True}, {"embed_cls": True}):
        text = {**spec["build"]["text_cfg"], **odd}
        with pytest.raises(ValueError, match=f"with {next(iter(odd))} is no plain CLIP text tower"):
            open_clip_config({"model_cfg": {**spec["build"], "text_cfg": text}})
    harmless = {**spec["build"]["text_cfg"], "pad_id": 0, "pool_type": "argmax", "embed_cls": False}
    assert open_clip_config({"model_cfg": {**spec["build"], "text_cfg": harmless}}) == config


def test_long_captions(tokenizer: ClipTokenizer):
    ids = tokenizer(["dog " * 5000, "dog " * 75, "dog " * 74, "w" * 100_000])
    assert ids.shape == (4, 77)
    assert ids[0].tolist() == ids[1].tolist() == [tokenizer.start, *[1929] * 75, tokenizer.end]
    assert ids[2].tolist() == [tokenizer.start, *[1929] * 74, tokenizer.end, 0]
    assert ids[3, 76] == tokenizer.end
    assert tokenizer([]).shape == (0, 77)


def test_merges_in_a_tokenizer_file(tokenizer: ClipTokenizer, tmp_path: Path):
    write_merges(tmp_path)
    merges = read_merges(tmp_path, 49408)
    (tmp_path / "merges.txt").unlink()
    for form in ([" ".join(pair) for pair in merges], [list(pair) for pair in merges]):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "merges": form}}))
        assert read_merges(tmp_path, 49408) == merges
    with pytest.raises(ValueError, match=re.escape("has 48894 merges, expected 49486 pairs")):
        read_merges(tmp_path, 50000)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no merges\.txt and no tokenizer\.json"):
        read_merges(tmp_path, 49408)
