"""Captions to embeddings, with tiny text encoders of the classes that the registry names, from a hub or a folder."""

import functools
import json
import shutil
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertModel,
    CLIPTextModel,
    Gemma2Model,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    Qwen3Model,
    RobertaModel,
    T5EncoderModel,
)

from microdit.model.pretrained.clip import ClipTokenizer, read_merges
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.text import filled_up, load_text_encoder, text_encoder_fingerprint
from microdit.model.pretrained.text_registry import TEXT_ENCODERS
from tests.model.pretrained.openclip_format import DATA, read_tokens, read_tower, write_model
from tests.model.pretrained.text_models import CAPTIONS, bert_files, clip_files, gemma_files, qwen3_files, t5_files
from tests.servers.hub import TOKEN, Hub

Files = dict[str, bytes]
FP32 = torch.float32
CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # of float32 through layers whose padding and batch differ

NAMED: dict[str, tuple[Callable[..., Files], type, list[str]]] = {
    "t5-xxl": (
        t5_files,
        T5EncoderModel,
        ["config.json", "pytorch_model.bin", "special_tokens_map.json", "spiece.model", "tokenizer_config.json"],
    ),
    "gemma-2-2b-it": (
        gemma_files,
        Gemma2Model,
        ["config.json", *(f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)), "model.safetensors.index.json",
         "tokenizer.json", "tokenizer_config.json"],
    ),
    "qwen3-0.6b": (
        qwen3_files, Qwen3Model, ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    ),
    "qwen3-4b": (
        qwen3_files, Qwen3Model, ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a model's files, made once for each way of making them."""

    @functools.cache
    def folder(make: Callable[..., Files], **options: Any) -> Path:
        path = tmp_path_factory.mktemp("models") / make.__name__
        make(path, **options)
        return path

    return folder


def wanted(folder: Path, kind: Any, caption: str, prompt: str = "{caption}", layer: int | None = None) -> torch.Tensor:
    """(tokens, width) of one caption alone, as transformers gives it: no padding, no batch, no mask.

    Without the tokens that stand in front of every caption: as many as the bare front of the prompt begins with too.
    """
    module, tokenizer = kind.from_pretrained(folder, dtype=FP32).eval(), AutoTokenizer.from_pretrained(folder)
    front = prompt.partition("{caption}")[0]
    ids = tokenizer(prompt.replace("{caption}", caption))["input_ids"]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(tokenizer(front)["input_ids"], ids, strict=False))
    skip = len(list(same)) if front else 0
    if not ids:
        return torch.zeros(0, module.config.hidden_size)
    with torch.no_grad():
        out = module(input_ids=torch.tensor([ids]), output_hidden_states=True)
    hidden = out.last_hidden_state if layer is None else out.hidden_states[layer]
    return hidden[0, skip:]


def check(encoder: Any, captions: list[str], expected: list[torch.Tensor]) -> None:
    """Each caption's embeddings are the expected ones, alone and beside longer ones, and zero stands behind them."""
    embeddings, lengths = encoder.encode(captions)
    assert embeddings.dtype == FP32
    assert lengths.tolist() == [len(e) for e in expected]
    assert embeddings.shape == (len(captions), max(lengths.tolist()), encoder.width)
    for i, (caption, alone) in enumerate(zip(captions, expected, strict=True)):
        torch.testing.assert_close(embeddings[i, : len(alone)], alone, **CLOSE)
        assert not embeddings[i, len(alone) :].any()
        unpadded, length = encoder.encode([caption])
        assert unpadded.shape == (1, len(alone), encoder.width) and length.tolist() == [len(alone)]
        torch.testing.assert_close(unpadded[0], alone, **CLOSE)


# -- the named ones ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMED)
def test_named_ones_from_the_hub(name: str, made: Callable[..., Path], hub: Hub):
    """The files that are needed, once, at the pinned commit; what `main` became afterwards does not matter."""
    make, kind, needed = NAMED[name]
    entry, folder = TEXT_ENCODERS[name], made(make)
    others = {"onnx/model.onnx": b"-", "flax_model.msgpack": b"-", "model.fp16.safetensors": b"-"}
    if "pytorch_model.bin" not in needed:
        others["pytorch_model.bin"] = b"another copy"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = hub.add(str(entry.where), {**others, **files}, commit=entry.revision, gated=name.startswith("gemma"))
    later = made(make, seed=1)
    hub.add(str(entry.where), later, gated=name.startswith("gemma"))
    if name.startswith("gemma"):
        message = "google/gemma-2-2b-it is gated: accept its terms at https://huggingface.co/google/gemma-2-2b-it, then"
        for ask in (text_encoder_fingerprint, load_text_encoder):
            with pytest.raises(ModelFilesError, match=message) as error:
                ask(name)
            assert "\n" not in str(error.value)
        Path(constants.HF_TOKEN_PATH).write_text(TOKEN)

    told = text_encoder_fingerprint(name, dtype=FP32)
    assert set(hub.downloads()) == {"config.json"} | {file for file in needed if file.endswith(".index.json")}
    assert told["repo"] == entry.where and told["revision"] == commit == entry.revision
    encoder = load_text_encoder(name, dtype=FP32)
    assert sorted(hub.downloads()) == needed
    assert encoder.fingerprint == told
    assert encoder.max_tokens == entry.max_tokens
    assert str(entry.where) not in entry.template and encoder.width == 32
    check(encoder, CAPTIONS, [wanted(folder, kind, c, entry.template, entry.hidden_layer) for c in CAPTIONS])
    moved, _ = load_text_encoder(name, dtype=FP32, revision="main").encode(["cat"])
    assert not torch.allclose(moved, encoder.encode(["cat"])[0])


def test_dfn_clip_from_the_hub(hub: Hub, tmp_path: Path):
    """Of two copies of the weights, that of open_clip; tokens, activation and norms as open_clip has them."""
    spec, arrays = read_tower(DATA / "openclip")
    write_model(tmp_path / "model", spec)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    files["pytorch_model.bin"] = b"the same in the names of transformers"
    files["config.json"] = b'{"model_type": "clip", "text_config": {"hidden_act": "gelu", "eos_token_id": 2}}'
    entry = TEXT_ENCODERS["dfn-clip-h"]
    hub.add(str(entry.where), files, commit=entry.revision)
    encoder = load_text_encoder("dfn-clip-h", dtype=FP32)
    assert sorted(hub.downloads()) == sorted(files.keys() - {"pytorch_model.bin"})
    assert encoder.fingerprint == text_encoder_fingerprint("dfn-clip-h", dtype=FP32)
    assert {"tokens": "open_clip", "hidden_act": "quick_gelu", "max_tokens": 77}.items() <= encoder.fingerprint.items()
    captions = [
        read_tokens(DATA / "openclip")["captions"][line["index_in_tokens"]]["text"] for line in spec["captions"]
    ]
    embeddings, lengths = encoder.encode(captions)
    torch.testing.assert_close(embeddings, torch.from_numpy(arrays["ln_final"]), **CLOSE)
    assert lengths.tolist() == [77] * len(captions)
    usual, _ = load_text_encoder("dfn-clip-h").encode(captions)  # float16
    assert 0 < (usual - embeddings).abs().max() < 0.05


def test_minilm_comes_in_a_package():
    encoder = load_text_encoder("minilm")
    folder = TEXT_ENCODERS["minilm"].where()  # type: ignore[operator]
    assert (encoder.width, encoder.max_tokens) == (384, 128)
    check(encoder, CAPTIONS, [wanted(folder, BertModel, caption) for caption in CAPTIONS])
    _, lengths = encoder.encode(["dog " * 500, "dog"])
    assert lengths.tolist() == [128, 3]


# -- any other --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "masked", "roberta"])
def test_any_bert(kind: str, made: Callable[..., Path], hub: Hub):
    folder = made(bert_files, kind=kind)
    hub.add("owner/name", folder)
    encoder = load_text_encoder("owner/name", dtype=FP32)
    assert encoder.max_tokens == (32 if kind == "roberta" else 64)  # RoBERTa's positions begin behind the pad token
    expected = [wanted(folder, RobertaModel if kind == "roberta" else BertModel, caption) for caption in CAPTIONS]
    check(encoder, CAPTIONS, expected)
    embeddings, lengths = encoder.encode(["dog " * 100])
    assert embeddings.shape[1] == lengths[0] == encoder.max_tokens


@pytest.mark.parametrize("whole", [True, False])
def test_any_clip(whole: bool, made: Callable[..., Path], hub: Hub):
    folder = made(clip_files, whole=whole)
    hub.add("owner/clip", folder)
    encoder = load_text_encoder("owner/clip", dtype=FP32)
    ids = ClipTokenizer(read_merges(folder, 49408))(CAPTIONS)
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state
    embeddings, lengths = encoder.encode(CAPTIONS)
    torch.testing.assert_close(embeddings, expected, **CLOSE)
    assert lengths.tolist() == [77] * len(CAPTIONS)
    assert encoder.fingerprint["hidden_act"] == "quick_gelu"


def test_a_repository_of_the_registry_is_used_as_its_name_is(made: Callable[..., Path], hub: Hub):
    entry = TEXT_ENCODERS["qwen3-0.6b"]
    hub.add(str(entry.where), made(qwen3_files), commit=entry.revision)
    assert text_encoder_fingerprint(str(entry.where)) == text_encoder_fingerprint("qwen3-0.6b")


# -- how a decoder LLM is asked ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", [0, 1, -2, -1, None])
def test_hidden_layers(layer: int | None, made: Callable[..., Path]):
    """Layers counted as transformers does: 0 the token embeddings, -1 and None behind the final norm."""
    for make, kind in ((gemma_files, Gemma2Model), (qwen3_files, Qwen3Model)):
        encoder = load_text_encoder(made(make), dtype=FP32, hidden_layer=layer)
        check(encoder, CAPTIONS, [wanted(made(make), kind, caption, layer=layer) for caption in CAPTIONS])


@pytest.mark.parametrize("template", ["{caption}", "{caption} in the fog", "a boat: {caption}", "a\n{caption}\nin fog"])
def test_templates(template: str, made: Callable[..., Path]):
    """What stands before the caption is seen by it and left out; what stands behind is kept."""
    for make, kind in ((gemma_files, Gemma2Model), (qwen3_files, Qwen3Model)):
        encoder = load_text_encoder(made(make), dtype=FP32, template=template)
        captions = [caption for caption in CAPTIONS if caption]
        check(encoder, captions, [wanted(made(make), kind, caption, template) for caption in captions])
    bare, _ = load_text_encoder(made(qwen3_files), dtype=FP32).encode(["cat"])
    assert not torch.allclose(bare, encoder.encode(["cat"])[0][:, : bare.shape[1]]) or template.startswith("{")


def test_a_decoder_of_older_names(made: Callable[..., Path], tmp_path: Path):
    """GPT-2 names its head, its layers and its positions in words of its own."""
    folder = shutil.copytree(made(qwen3_files), tmp_path / "gpt2")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=360, n_embd=32, n_layer=2, n_head=4, n_positions=64)).save_pretrained(folder)
    encoder = load_text_encoder(folder, dtype=FP32, hidden_layer=-2)
    assert encoder.max_tokens == 64
    check(encoder, CAPTIONS, [wanted(folder, GPT2Model, caption, layer=-2) for caption in CAPTIONS])


def test_nothing_but_empty_captions(made: Callable[..., Path]):
    encoder = load_text_encoder(made(qwen3_files), dtype=FP32)
    embeddings, lengths = encoder.encode(["", ""])
    assert embeddings.shape == (2, 0, 32) and lengths.tolist() == [0, 0]
    encoder = load_text_encoder(made(qwen3_files), dtype=FP32, template="a boat: {caption}")
    embeddings, lengths = encoder.encode(["", "red"])
    assert lengths[0] == 0 < lengths[1] and not embeddings[0].any() and embeddings[1].any()


def test_long_captions_are_cut(made: Callable[..., Path]):
    """The tokens that are left are those of the whole caption, as far as a model looks back alone."""
    caption = "red apple in the fog with a dog under the boat"
    for make, template in ((gemma_files, "a boat: {caption} in fog"), (qwen3_files, "{caption}")):
        whole, [length] = load_text_encoder(made(make), dtype=FP32, template=template).encode([caption])
        assert length > 8
        encoder = load_text_encoder(made(make), dtype=FP32, template=template, max_tokens=8)
        embeddings, lengths = encoder.encode([caption, "cat"])
        assert embeddings.shape == (2, 8, 32) and lengths[0] == 8 > lengths[1]
        torch.testing.assert_close(embeddings[0], whole[0, :8], **CLOSE)
    encoder = load_text_encoder(made(t5_files), dtype=FP32, max_tokens=4)
    assert [tuple(encoder.encode([text])[0].shape[:2]) for text in ("dog " * 300, "")] == [(1, 4), (1, 1)]
    assert load_text_encoder(made(t5_files), max_tokens=512).encode(["dog " * 900])[1].tolist() == [512]


# -- saved and moved --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [t5_files, bert_files, clip_files, gemma_files, qwen3_files])
def test_saved_and_opened_it_is_equal(make: Callable[..., Files], made: Callable[..., Path], tmp_path: Path):
    """A decoder LLM is saved without its head, under the name of its base class, and still known for one."""
    options: dict[str, Any] = {}
    if make in (gemma_files, qwen3_files):
        options = {"template": "a boat: {caption}", "hidden_layer": 1}
    encoder = load_text_encoder(made(make), **options)
    encoder.save_pretrained(tmp_path / "saved")
    again = load_text_encoder(tmp_path / "saved", **options)
    assert again.class_name == encoder.class_name
    captions = [*CAPTIONS, "<end_of_text> \n &amp; a DOG's"]
    for one, other in zip(again.encode(captions), encoder.encode(captions), strict=True):
        assert torch.equal(one, other)
    assert not list((tmp_path / "saved").glob("*.bin"))
    assert str(made(make)) not in "".join(path.read_text() for path in (tmp_path / "saved").glob("*.json"))
    with pytest.raises(FileExistsError, match="saved is there already: give a new folder"):
        encoder.save_pretrained(tmp_path / "saved")


def test_moved_to_another_device(made: Callable[..., Path]):
    for make in (t5_files, clip_files):
        encoder = load_text_encoder(made(make))
        assert encoder.device == torch.device("cpu")
        assert encoder.to("meta") is encoder and encoder.device == torch.device("meta")


# -- what goes wrong --------------------------------------------------------------------------------------------------
def test_an_interrupted_download_is_resumed(made: Callable[..., Path], hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what reaches the disk together
    hub.add("google/t5-v1_1-xxl", made(t5_files), commit=TEXT_ENCODERS["t5-xxl"].revision)
    hub.faults["pytorch_model.bin"] = [("cut", 30_000), ("cut", 20_000)]
    encoder = load_text_encoder("t5-xxl", dtype=FP32)
    first, second, third = (hub.ranges("pytorch_model.bin"), *([None] * 3))[0][:3]
    assert first is None and second and third
    starts = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in (second, third)]
    assert 20_000 < starts[0] <= 30_000 and starts[0] + 10_000 < starts[1] <= 50_000
    check(encoder, CAPTIONS, [wanted(made(t5_files), T5EncoderModel, caption) for caption in CAPTIONS])


def test_what_cannot_be_asked(made: Callable[..., Path], tmp_path: Path):
    t5, qwen3, clip, bert = made(t5_files), made(qwen3_files), made(clip_files), made(bert_files)
    for options in ({"hidden_layer": -2}, {"template": "a {caption}"}):
        with pytest.raises(ValueError, match="is no decoder LLM: hidden_layer and template are for those alone"):
            load_text_encoder(t5, **options)
    for template in ("a photo", "{caption} {caption}"):
        with pytest.raises(ValueError, match=r"expected \{caption\} in it, once"):
            load_text_encoder(qwen3, template=template)
    for layer in (4, -5):
        with pytest.raises(ValueError, match=rf"hidden_layer={layer}: .* has 3 layers, of -4 to 3"):
            load_text_encoder(qwen3, hidden_layer=layer)
    with pytest.raises(ValueError, match="max_tokens=120: a CLIP text tower gives all its 77 positions"):
        load_text_encoder(clip, max_tokens=120)
    with pytest.raises(ValueError, match=r"max_tokens=65: .* takes 2 to 64 tokens"):
        load_text_encoder(bert, max_tokens=65)
    unknown = (
        "text encoder 't5-xxxl' is neither an existing folder nor a hub repository id.*named ones are minilm, t5-xxl"
    )
    with pytest.raises(ValueError, match=unknown):
        load_text_encoder("t5-xxxl")
    with pytest.raises(ValueError, match=r"there is no config\.json with a model_type; named ones are minilm, t5-xxl"):
        load_text_encoder(tmp_path)
    others: list[dict[str, Any]] = [
        {"model_type": "vit"},
        {"model_type": "camembert"},  # there are heads for both next and masked tokens
        {"model_type": "whisper", "is_encoder_decoder": True},
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
    ]
    for config in others:
        (tmp_path / "config.json").write_text(json.dumps(config))
        kind = config["model_type"]
        with pytest.raises(ValueError, match=f"{kind!r} is neither a T5, a BERT, a CLIP text tower nor a decoder LLM"):
            load_text_encoder(tmp_path)


def test_damaged_and_incomplete_weights(made: Callable[..., Path], tmp_path: Path):
    folder = shutil.copytree(made(qwen3_files), tmp_path / "qwen3")
    weights = folder / "model.safetensors"
    state = load_file(weights)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ModelFilesError, match=r"lacks 1 of its model's weights: .*layers\.1\.mlp\.up_proj\.weight"):
        load_text_encoder(folder)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelFilesError, match=r"model\.safetensors is damaged"):
        load_text_encoder(folder)

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    folder = shutil.copytree(made(t5_files), tmp_path / "t5")
    torch.save({"shared.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(
        ModelFilesError, match=r"t5: pytorch_model\.bin is damaged \(.*\); put a whole copy into"
    ) as error:
        load_text_encoder(folder)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    write_model(tmp_path / "clip", read_tower(DATA / "openclip")[0])
    torch.save({"token_embedding.weight": Trap()}, tmp_path / "clip" / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelFilesError, match=r"open_clip_pytorch_model\.bin is damaged"):
        load_text_encoder(tmp_path / "clip")
    assert not (tmp_path / "sprung").exists()


def test_batches_are_filled_up_to_a_few_lengths():
    assert [filled_up(n, 120) for n in (1, 8, 9, 64, 65, 97, 120)] == [8, 8, 16, 64, 96, 120, 120]
    assert filled_up(2000, 4096) == 4096
    lengths = {filled_up(n, 120) for n in range(1, 121)}
    assert len(lengths) <= 10


def test_trimmed_clip_text_is_the_beginning_of_the_whole(made: Callable[..., Path]):
    folder = made(clip_files)
    whole, trimmed = load_text_encoder(folder), load_text_encoder(folder, trim=True)
    captions = ["a cat", "", "a <end_of_text> in the middle!", "many words " * 60]
    everything, all_lengths = whole.encode(captions)
    embeddings, lengths = trimmed.encode(captions)
    assert all_lengths.tolist() == [77] * 4
    assert lengths[3] == 77 and lengths[1] == 2 and 2 < lengths[0] < lengths[2] < 77
    for one, other, length in zip(everything, embeddings, lengths.tolist(), strict=True):
        assert torch.allclose(one[:length], other[:length], atol=1e-2)
        assert not other[length:].any()
    assert trimmed.fingerprint == {**whole.fingerprint, "trim": True} == text_encoder_fingerprint(folder, trim=True)
