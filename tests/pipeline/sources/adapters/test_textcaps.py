"""TextCaps: one entry for each caption, one zip for all splits."""

import json
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import TextcapsSource
from microdit.pipeline.sources.adapters.textcaps import Textcaps
from tests.pipeline.helpers.dataset_archives import by_key, write_zip


def entries(image: str, captions: list[str], **more) -> list[dict]:
    shared = {"image_id": image, "reference_strs": captions, "reference_tokens": [c.split() for c in captions], **more}
    return [{**shared, "caption_id": i, "caption_str": text} for i, text in enumerate(captions)]


def source(folder: Path, **options) -> Textcaps:
    train = entries("aa", [f"A sign\nsays {i}" for i in range(5)]) + entries("gone", ["Lost."])
    plain = [{"image_id": "bb", "caption_str": text} for text in ("First.", "Second.")]
    (folder / "TextCaps_0.1_train.json").write_text(json.dumps({"data": train, "dataset_type": "train"}))
    (folder / "TextCaps_0.1_val.json").write_text(json.dumps({"data": plain}))
    write_zip(folder / "all.zip", {f"train_images/{name}.jpg": name.encode() for name in ("aa", "bb", "test")})
    given = {"images": str(folder / "all.zip"), "captions": f"{folder}/TextCaps_0.1_{{split}}.json", **options}
    return Textcaps("textcaps", TextcapsSource(adapter="textcaps", **given), folder)


def test_an_image_has_all_its_captions_once(tmp_path: Path):
    found = by_key(source(tmp_path))
    assert list(found) == ["aa", "bb", "gone"]
    first = found["aa"]
    assert (first.data, first.caption, first.origin) == (b"aa", "A sign says 0", "textcaps/all.zip/train_images/aa.jpg")
    assert first.fields == {**{f"caption_{i + 1}": f"A sign says {i}" for i in range(5)}, "split": "train"}
    assert found["bb"].fields == {"caption_1": "First.", "caption_2": "Second.", "split": "val"}
    assert (found["gone"].data, found["gone"].reason) == (None, "missing")


def test_one_split(tmp_path: Path):
    assert list(by_key(source(tmp_path, splits=["val"]))) == ["bb"]
    assert source(tmp_path).stage() != source(tmp_path, splits=["val"]).stage()


@pytest.mark.parametrize("text", ["{", '{"data": []}', '{"other": [{"image_id": "a", "caption_str": "b"}]}', "[1]"])
def test_a_file_of_something_else(tmp_path: Path, text: str):
    wrong = source(tmp_path)
    (tmp_path / "TextCaps_0.1_train.json").write_text(text)
    with pytest.raises(RequestError, match=r"sources\.textcaps\.captions: TextCaps_0\.1_train\.json"):
        by_key(wrong)
