"""Captioners of every family, tiny and random: their prompts, their batches, their draws, and where they come from."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.processing_utils import ProcessorMixin

from microdit.model.pretrained.captioners import CaptionModel, _TokenDraw, captioner_fingerprint, load_captioner
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.prompts import default_prompt
from tests.model.pretrained.captioner_models import CHAT, FAMILIES, IMAGES, vision_folder
from tests.model.pretrained.text_models import files_of, qwen3_files
from tests.servers.hub import Hub

PROMPT = "a red apple"

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "blip": ("BlipProcessor", {}),
    "florence2": ("Florence2Processor", {}),
    "llava": (
        "LlavaProcessor",
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "internvl": ("InternVLProcessor", {"image_seq_length": 4, "video_processor": object()}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", {"video_processor": object()}),
    "qwen3_vl": ("Qwen3VLProcessor", {"video_processor": object()}),
}


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    """Large patches of colour: noise looks alike to a model."""
    patches = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST))


IMAGE_SET = [pixels(0, 64, 64), pixels(1, 48, 96), pixels(2, 70, 50)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CaptionModel:
    """In float32, in which a batch's padding moves nothing that could change a word."""
    found = load_captioner(vision_folder(tmp_path_factory.mktemp("models") / request.param, request.param))
    assert found.fingerprint["dtype"] == ("float32" if request.param == "blip" else "bfloat16")
    found.module.float()
    return found


def test_inputs_are_those_of_transformers_own_processor(model: CaptionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which, without torchvision, are made here but for what they do with videos."""
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    name, options = PROCESSORS[model.family]
    processor = getattr(transformers, name)(image_processor=model._images, tokenizer=model._tokenizer, **options)
    text = PROMPT
    if model.family in IMAGES:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
        template = CHAT.replace("IMAGE", IMAGES[model.family])
        text = model._tokenizer.apply_chat_template(
            [message], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    for image in IMAGE_SET:
        theirs, ours = processor(images=[image], text=[text], return_tensors="pt"), model.prepare(image)
        assert theirs["input_ids"][0].tolist() == model.ids(PROMPT, ours.tokens)
        for tensor, value in ours.tensors.items():
            assert torch.equal(theirs[tensor], value)


def test_a_batch_says_what_each_image_alone_does(model: CaptionModel) -> None:
    pictures = [model.prepare(image) for image in IMAGE_SET]
    for temperature in (0.0, 1.0):
        together = model.generate(pictures, PROMPT, 8, temperature, [1, 2, 3])
        assert len({answer.text for answer in together}) > 1
        for i, picture in enumerate(pictures):
            assert model.generate([picture], PROMPT, 8, temperature, [i + 1]) == [together[i]]


def test_a_seed_is_all_that_a_draw_depends_on(model: CaptionModel) -> None:
    picture = model.prepare(IMAGE_SET[0])
    drawn = model.generate([picture] * 3, PROMPT, 12, 1.0, [7, 8, 7])
    assert drawn[0] == drawn[2] != drawn[1]
    assert model.generate([picture], PROMPT, 12, 1e-6, [7]) == model.generate([picture], PROMPT, 12, 0.0, [0])


def test_an_answer_says_whether_it_came_to_an_end(model: CaptionModel) -> None:
    picture = model.prepare(IMAGE_SET[0])
    answers = model.generate([picture] * 64, PROMPT, 40, 2.0, list(range(64)))
    lengths = {True: [], False: []}  # type: dict[bool, list[int]]
    for answer in answers:
        lengths[answer.finished].append(len(answer.text))
    assert lengths[True] and lengths[False]
    assert np.mean(lengths[True]) < np.mean(lengths[False])


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -3.0])
    rows = 1000
    uniform = (torch.arange(rows, dtype=torch.float64) + 0.5)[:, None] / rows
    found = Counter(_TokenDraw(0.5, uniform)(torch.zeros(rows, 1), logits.repeat(rows, 1)).argmax(-1).tolist())
    for token, probability in enumerate(torch.softmax(logits / 0.5, -1).tolist()):
        assert abs(found[token] - probability * rows) <= 1


def test_a_name_is_a_repository_at_a_commit(tmp_path: Path, hub: Hub) -> None:
    files = files_of(Path(vision_folder(tmp_path / "made", "qwen3_vl")))
    commit = hub.add("Qwen/Qwen3-VL-4B-Instruct", {**files, "model.gguf": b"another", "modeling_evil.py": b"exit()"})
    told = captioner_fingerprint("qwen3-vl-4b")
    assert "model.safetensors" not in hub.downloads()  # nothing but the config is asked for
    assert (told["repo"], told["revision"]) == ("Qwen/Qwen3-VL-4B-Instruct", commit)
    found = load_captioner("qwen3-vl-4b")
    assert found.fingerprint == told
    assert not {"model.gguf", "modeling_evil.py"} & set(hub.downloads())
    local = load_captioner(tmp_path / "made")
    picture = found.prepare(IMAGE_SET[0])
    assert found.generate([picture], PROMPT, 6, 0.0, [0]) == local.generate([picture], PROMPT, 6, 0.0, [0])


def test_what_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'qwen9' is neither an existing folder nor .*; named ones are qwen3-vl-2b"):
        load_captioner("qwen9")
    text = tmp_path / "text"
    qwen3_files(text)
    with pytest.raises(ValueError, match="model_type 'qwen3' is none of qwen2_vl"):
        captioner_fingerprint(text)
    whole = Path(vision_folder(tmp_path / "whole", "blip"))
    for name, others in (
        ("preprocessor_config.json", " or processor_config.json"),
        ("tokenizer.json", " or vocab.json or vocab.txt"),
        ("model.safetensors", " or model.safetensors.index.json or pytorch_model.bin"),
    ):
        broken = Path(shutil.copytree(whole, tmp_path / name))
        (broken / name).unlink()
        for ask in (load_captioner, captioner_fingerprint):
            with pytest.raises(ModelFilesError, match=rf"{name} lacks (weights \()?{name}{others}"):
                ask(broken)
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelFilesError, match=r"model.safetensors is damaged"):
        load_captioner(cut)


def test_other_files_are_another_fingerprint(tmp_path: Path) -> None:
    folder = Path(vision_folder(tmp_path / "one", "qwen2_5_vl"))
    before = captioner_fingerprint(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    assert captioner_fingerprint(folder)["sha256"] != before["sha256"]
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    with pytest.raises(ValueError, match="'llava_next'"):
        captioner_fingerprint(folder)


def test_a_prompt_must_not_be_an_image(model: CaptionModel) -> None:
    if model.family != "blip":
        image = model._tokenizer.convert_ids_to_tokens(model._image_id)
        with pytest.raises(ValueError, match="it must not hold the model's token for an image"):
            model.ids(f"two {image}", 4)


def test_kinds_have_prompts() -> None:
    for family in ("chat", "florence2", "blip"):
        for kind in ("alt", "short", "long"):
            assert isinstance(default_prompt(kind, family), str)
    assert default_prompt("long") != default_prompt("short") != default_prompt("tags")
    with pytest.raises(ValueError, match="florence2 has no prompt for it"):
        default_prompt("tags", "florence2")
