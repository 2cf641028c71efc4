"""From pictures to detections and GenEval's figures, with a small detector and a small CLIP of random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from microdit.model.pretrained import mask2former
from microdit.model.pretrained.feature_towers import load_feature_tower
from microdit.model.pretrained.mask2former import DetectedObject, ObjectDetector, network_of
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.evaluation import detecting
from microdit.pipeline.evaluation.detecting import NAMES, ColorJudge
from microdit.pipeline.evaluation.evaluate import EvaluationOptions, evaluate_pictures
from microdit.pipeline.evaluation.geneval import COLORS
from tests.model.pretrained.mmdet_mask2former import Detector
from tests.model.pretrained.test_vision import CLIP_MEAN, CLIP_STD, picture, pixel_values
from tests.model.pretrained.vision_models import clip_model
from tests.pipeline.evaluation.test_evaluate import folder


def test_the_classes_are_the_80_of_coco() -> None:
    assert len(NAMES) == 80 == len(set(NAMES))
    assert (NAMES[0], NAMES[16], NAMES[64], NAMES[65], NAMES[66], NAMES[79]) == (
        "person", "dog", "computer mouse", "tv remote", "computer keyboard", "toothbrush",
    )  # fmt: skip


@torch.inference_mode()
def test_a_color_is_the_nearest_by_three_texts(tmp_path: Path) -> None:
    name = clip_model(tmp_path)
    pixels = picture(3, 40, 40)
    mask = np.zeros((40, 40), bool)
    mask[10:30, 5:25] = True
    judged = ColorJudge(load_feature_tower(name, captions=True))(
        pixels, [DetectedObject(16, 0.9, (5.0, 10.0, 25.0, 30.0), mask)]
    )
    crop = np.where(mask[..., None], pixels, np.uint8(153))[10:30, 5:25]
    module, tokenizer = CLIPModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)

    def unit(values: Any) -> torch.Tensor:
        values = values if isinstance(values, torch.Tensor) else values.pooler_output
        return torch.nn.functional.normalize(values, dim=-1)

    seen = unit(module.get_image_features(pixel_values=pixel_values(crop, 16, CLIP_MEAN, CLIP_STD, 16)))
    cosines = []
    for color in COLORS:
        texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
        read = unit(module.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt"))).mean(0)
        cosines.append(float(seen @ read / read.norm()))
    assert judged == [COLORS[int(np.argmax(cosines))]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A detector of random weights that finds things at once; counts the pictures that it sees."""
    torch.manual_seed(5)
    network = network_of(Detector().state_dict(), heads=(1, 2, 4, 8))
    with torch.no_grad():
        network.class_predictor.weight.mul_(20)
    seen: list[int] = []

    class Counting(ObjectDetector):
        def detect(self, pixels: np.ndarray) -> list[DetectedObject]:
            seen.append(len(seen))
            return super().detect(pixels)

    monkeypatch.setattr(mask2former, "SHORT", 96)
    monkeypatch.setattr(detecting, "load_detector", lambda *_: Counting(network))
    return seen


def test_pictures_are_detected_once_and_judged(small: list[int], tmp_path: Path) -> None:
    pictures = folder(tmp_path / "pictures", range(6))
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"tag": "colors", "prompt": f"picture {i}", "include": [{"class": NAMES[i % 5], "count": 1, "color": "red"}]}
        for i in range(6)
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {"mask2former": "small", "clip-l14-colors": clip_model(tmp_path / "clip")}
    options = EvaluationOptions(["geneval"], models=models, out=tmp_path / "out", prompts=prompts)
    found = evaluate_pictures(pictures, None, options)["metrics"]["geneval"]
    assert len(small) == 6 and set(found["tasks"]) == {"colors"}
    path = tmp_path / "out" / "detections.jsonl"
    whole = path.read_text()
    detected = [json.loads(line) for line in whole.splitlines()]
    assert sum(len(each["detections"]) for each in detected) > 6  # or nothing is tested
    assert all(each["score"] > 0.3 for line in detected for each in line["detections"])
    assert any("color" in each for line in detected for each in line["detections"])
    path.write_text(whole[: len(whole) - 20])  # the last line was cut off
    assert evaluate_pictures(pictures, None, options)["metrics"]["geneval"] == found
    assert len(small) == 7 and path.read_text() == whole
    Image.new("RGB", (48, 48)).save(pictures / "extra.png")
    (pictures / "extra.txt").write_text("something else")
    with pytest.raises(RequestError, match=r"extra\.png: its caption 'something else' is none of the 6 prompts"):
        evaluate_pictures(pictures, None, options)


def test_a_detector_must_be_given(tmp_path: Path) -> None:
    pictures = folder(tmp_path / "pictures", range(2))
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"tag": "single_object", "prompt": f"picture {i}", "include": []} for i in range(2)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = EvaluationOptions(["geneval"], out=tmp_path / "out", prompts=prompts)
    with pytest.raises(RequestError, match=r"give its path as --model mask2former=PATH, or give a file of detections"):
        evaluate_pictures(pictures, None, options)
