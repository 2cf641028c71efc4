"""Features of CLIP and DINOv2 through the loading code, against transformers by hand; CLIP scores likewise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, Dinov2Model

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation import features
from microdit.pipeline.evaluation.clip_scores import CONVENTIONS, clip_score
from microdit.pipeline.evaluation.features import CLIP_MEAN, CLIP_STD, WIDTHS, load_extractor
from tests.model.pretrained.test_vision import picture, pixel_values
from tests.model.pretrained.vision_models import clip_model, dino_model

CAPTIONS = ["a red apple", "a green apple on the old table near the river and the house " * 9, "a dog"]


def cosines(name: str, images: list[np.ndarray], captions: list[str]) -> np.ndarray:
    """What CLIP says through transformers alone."""
    module = CLIPModel.from_pretrained(name).eval()
    values = torch.cat([pixel_values(image, 16, CLIP_MEAN, CLIP_STD, 16) for image in images])
    tokens = AutoTokenizer.from_pretrained(name)(
        captions, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.inference_mode():
        output = module(pixel_values=values, **tokens)
    return torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).numpy()


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_clip_score_is_made_of_cosines(name: str, tmp_path: Path) -> None:
    model, images = clip_model(tmp_path), [picture(i) for i in range(3)]
    found = clip_score(name, images, CAPTIONS, model)
    expected = cosines(model, images, [f"A photo depicts {text}" if "hessel" in name else text for text in CAPTIONS])
    if "hessel" in name:
        expected = 2.5 * np.maximum(expected, 0)
    elif "torchmetrics" in name:
        expected = 100 * expected
    value = max(expected.mean(), 0) if "torchmetrics" in name else expected.mean()
    assert found["value"] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert found["error"] == pytest.approx(expected.std(ddof=1) / 3**0.5, rel=1e-3)
    assert found["prefix"] == ("A photo depicts " if "hessel" in name else "")


def test_features_of_clip_are_not_scaled_for_one_metric_and_are_for_the_other(tmp_path: Path) -> None:
    model, images = clip_model(tmp_path), [picture(i, 44, 44) for i in range(3)]
    module = CLIPModel.from_pretrained(model).eval()
    values = torch.cat([pixel_values(image, 16, CLIP_MEAN, CLIP_STD, 16) for image in images])
    with torch.inference_mode():
        expected = module.get_image_features(pixel_values=values)
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    plain = np.concatenate(list(load_extractor("clip-b32", model=model).extract(images)))
    assert plain == pytest.approx(expected.numpy(), abs=1e-5)
    unit = np.concatenate(list(load_extractor("clip-l14", model=model).extract(images)))
    assert unit == pytest.approx(torch.nn.functional.normalize(expected, dim=-1).numpy(), abs=1e-5)


def test_features_of_dino_are_the_class_token_of_the_whole_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "DINOV2_SIDE", 32)
    model, images = dino_model(tmp_path / "dino"), [picture(0), picture(1, 90, 44)]
    values = torch.cat([pixel_values(image, 32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for image in images])
    with torch.inference_mode():
        expected = Dinov2Model.from_pretrained(model).eval()(pixel_values=values).last_hidden_state[:, 0]
    found = np.concatenate(list(load_extractor("dinov2", model=model).extract(images)))
    assert found == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_identity_follows_the_weights(tmp_path: Path) -> None:
    first, second = clip_model(tmp_path / "a"), clip_model(tmp_path / "b")
    assert load_extractor("clip-b32", model=first).identity == load_extractor("clip-b32", model=second).identity
    weights = tmp_path / "b" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert load_extractor("clip-b32", model=first).identity != load_extractor("clip-b32", model=second).identity


def test_efficientnet_needs_no_hub() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    extractor = load_extractor("lite0")
    (found,) = extractor.extract([picture(0), picture(1)])
    assert found.shape == (2, WIDTHS["lite0"]) and np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)


def test_pictures_are_taken_in_their_order() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    images = [picture(i) for i in range(40)]
    extractor = load_extractor("lite0")
    found = np.concatenate(list(extractor.extract(images)))
    (last,) = extractor.extract(images[-1:])
    assert found[-1] == pytest.approx(last[0], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg", {}, "features 'vgg': it is not known; there are inception, clip-b32"),
        ("inception", {}, "features 'inception': its weights are no part of any package: download"),
        ("inception", {"protocol": "mine"}, "protocol 'mine' is not known; there are clean-fid, pytorch-fid"),
        ("inception", {"model": "/nowhere/a.pth"}, "No such file"),
        ("clip-b32", {"model": "/nowhere"}, "neither an existing folder nor a hub repository"),
    ],
)
def test_what_cannot_be_loaded_is_refused(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_extractor(name, **options)  # type: ignore[arg-type]


def test_a_score_needs_a_model_that_reads(tmp_path: Path) -> None:
    model = dino_model(tmp_path / "dino")
    with pytest.raises(RequestError, match="clip-score-mlperf"):
        clip_score("clip-score-mlperf", [np.asarray(Image.new("RGB", (32, 32)))], ["a"], model)
