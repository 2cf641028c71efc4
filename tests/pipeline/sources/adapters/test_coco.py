"""COCO: the rule that chooses the 30,000, and the captions of an image."""

import json
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import CocoSource
from microdit.pipeline.sources.adapters.coco import CAPTIONS, Coco, choose
from tests.pipeline.helpers.dataset_archives import by_key, write_zip


def source(folder: Path, zipped: bool = True, **options) -> Coco:
    annotations = [{"image_id": i % 10, "id": i, "caption": f"Caption {i}\n"} for i in range(20)]
    text = json.dumps({"annotations": annotations}).encode()
    write_zip(
        folder / "annotations.zip", {"annotations/instances_val2014.json": b"{}", f"annotations/{CAPTIONS}": text}
    )
    (folder / CAPTIONS).write_bytes(text)
    names = {i: f"val2014/COCO_val2014_{i:012d}.jpg" for i in range(9)}
    write_zip(folder / "val2014.zip", {name: str(i).encode() for i, name in names.items()})
    captions = folder / ("annotations.zip" if zipped else CAPTIONS)
    given = {"images": str(folder / "val2014.zip"), "captions": str(captions), **options}
    return Coco("coco", CocoSource(adapter="coco", **given), folder)


def test_the_rule_is_fixed():
    """The list is fixed: a change of it changes the list of all users."""
    assert sorted(choose(range(1, 101), 5, 2014)) == [12, 21, 42, 93, 99]
    assert choose(range(3), None, 2014) == {0, 1, 2} == choose(range(3), 30_000, 2014)


def test_the_chosen_images_with_all_their_captions(tmp_path: Path):
    found = by_key(source(tmp_path, choose=4))
    chosen = choose(range(10), 4, 2014)
    assert set(found) == {f"COCO_val2014_{i:012d}" for i in chosen}
    for i in chosen - {9}:
        item = found[f"COCO_val2014_{i:012d}"]
        assert (item.data, item.caption) == (str(i).encode(), f"Caption {i}")
        assert item.fields == {"caption_1": f"Caption {i}", "caption_2": f"Caption {i + 10}", "image_id": i}


@pytest.mark.parametrize("zipped", [True, False])
def test_all_and_one_that_the_zip_lacks(tmp_path: Path, zipped: bool):
    found = by_key(source(tmp_path, zipped, choose=None))
    assert len(found) == 10
    assert [key for key, item in found.items() if item.reason == "missing"] == ["COCO_val2014_000000000009"]


def test_captions_of_something_else(tmp_path: Path):
    write_zip(tmp_path / "other.zip", {"annotations/instances_val2014.json": b"{}"})
    (tmp_path / "other.json").write_text('{"annotations": [{"caption": 3}]}')
    for name in ("other.zip", "other.json"):
        with pytest.raises(RequestError, match=rf"sources\.coco\.captions: .*{name}"):
            by_key(source(tmp_path, captions=str(tmp_path / name)))
