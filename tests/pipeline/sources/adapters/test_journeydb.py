"""JourneyDB: splits, folders and their annotations, which caption, and Midjourney's flags."""

from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import JourneydbSource
from microdit.pipeline.sources.adapters.journeydb import Journeydb, strip_flags
from tests.pipeline.helpers.dataset_archives import by_key, empty, read_all, write_tar

TRAIN = {
    "000/aa": {"prompt": "a cat, oil --ar 16:9 --v 5", "task2": "A cat is painted in oil."},
    "000/bb": {"prompt": "a dog", "task2": None},
    "000/cc": {"prompt": "--tile", "task2": "ok"},
}

VALID = {"000/dd": {"prompt": "a fish", "task2": "A fish swims."}}


def source(root: Path, **options) -> Journeydb:
    members = {"000/": b"", "000/aa.jpg": b"a", "./000/bb.jpg": b"b", "000/cc.jpg": b"c", "000/ee.jpg": b"e"}
    write_tar(root / "data/train/imgs/000.tgz", {n: d for n, d in members.items() if d}, "w:gz")
    write_tar(root / "data/valid/imgs/000.tgz", {"dd.jpg": b"d"}, "w:gz")
    empty(root / "data/train/train_anno.jsonl.tgz")  # the one with other folders
    empty(root / "data/train/train_anno_realease_repath.jsonl.tgz")
    empty(root / "data/valid/valid_anno_repath.jsonl.tgz")
    return Journeydb("jdb", JourneydbSource(adapter="journeydb", root=f"{root}/", **options), root)


def test_the_prompt_as_it_was_typed(tmp_path: Path):
    found = by_key(source(tmp_path), TRAIN)
    assert {key: item.caption for key, item in found.items()} == {
        "000_aa": "a cat, oil --ar 16:9 --v 5",
        "000_bb": "a dog",
        "000_cc": "--tile",
        "000_ee": "",
    }
    assert found["000_aa"].fields == {
        "prompt": "a cat, oil --ar 16:9 --v 5",
        "task2": "A cat is painted in oil.",
        "split": "train",
    }
    assert found["000_aa"].origin == "jdb/train/000.tgz/000/aa.jpg"
    assert (found["000_ee"].reason, found["000_ee"].detail) == ("no_caption", "the annotations have no 000/ee")


def test_task2_and_the_prompt_in_its_place_only_if_asked(tmp_path: Path):
    found = by_key(source(tmp_path, caption="task2"), TRAIN)
    assert [(item.caption, item.reason) for item in found.values()] == [
        ("A cat is painted in oil.", None),
        ("", "no_caption"),
        ("ok", None),
        ("", "no_caption"),
    ]
    found = by_key(source(tmp_path, caption="task2", prompt_fallback=True, strip_flags=True), TRAIN)
    assert [(item.caption, item.reason) for item in found.values()] == [
        ("A cat is painted in oil.", None),
        ("a dog", None),
        ("", "no_caption"),
        ("", "no_caption"),
    ]


def test_both_splits_each_with_its_annotations(tmp_path: Path):
    both = source(tmp_path, splits=["train", "valid"])
    assert [spec.listing.files[0].name for spec in both.tables()] == [
        "train_anno_realease_repath.jsonl.tgz",
        "valid_anno_repath.jsonl.tgz",
    ]
    assert both.units() == ["jdb-000000", "jdb-000001"]
    last = read_all(both, TRAIN, VALID)[-1]
    assert (last.key, last.caption, last.fields["split"]) == (
        "000_dd",
        "a fish",
        "valid",
    )  # an archive without its folder
    assert source(tmp_path, splits=["valid"], units=["valid/000.tgz"]).units() == ["jdb-000000"]
    with pytest.raises(RequestError, match=r"train/000\.tgz"):
        source(tmp_path, units=["valid/000.tgz"]).units()


@pytest.mark.parametrize(
    ("prompt", "stripped"),
    [
        ("a cat --ar 16:9 --v 5", "a cat"),
        ("a cat, --niji", "a cat"),
        ("a cat --no dogs, trees --q 2", "a cat"),
        ("a cat --tile in a hat --hd", "a cat in a hat"),
        ("a cat —ar 2:3", "a cat"),
        ("a cat —by someone", "a cat —by someone"),
        ("state-of-the-art -- a cat - 3-4", "state-of-the-art -- a cat - 3-4"),
        ("a cat --ar 16:9, ultra detailed", "a cat, ultra detailed"),
        ("--v 4", ""),
    ],
)
def test_flags_are_cut(prompt: str, stripped: str):
    assert strip_flags(prompt) == stripped
