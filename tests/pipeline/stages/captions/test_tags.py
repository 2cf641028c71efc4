"""The tagger, with its real weights, on drawings that look like what they show; and as a column."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from microdit.model.pretrained.tagger import Tagger, load_tagger, tagger_fingerprint
from microdit.pipeline.sources.openmoji.drawings import rasterise, svg_files
from tests.pipeline.helpers.stage_outputs import check_rows, lines, make, start

NAMES = {"1FA9D": "hook", "2602": "umbrella", "23F0": "analog clock", "1F6A6": "traffic light"}


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    return load_tagger("efficientnet-lite0")


def drawing(code: str) -> np.ndarray:
    image = rasterise(svg_files()[code].read_text(), 256).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def test_drawings_have_their_names(tagger: Tagger) -> None:
    found = tagger.tag([tagger.prepare(drawing(code)) for code in NAMES], 3, 0.05)
    assert [tags[0][0] for tags in found] == list(NAMES.values())
    for tags in found:
        assert 0.3 < tags[0][1] < 1 and len(tags) <= 3
        assert all(0.05 <= after <= before for (_, before), (_, after) in itertools.pairwise(tags))
    assert tagger.tag([tagger.prepare(drawing("2602"))], 3, 0.99) == [[]]


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (224, 224), (640, 480)])
def test_any_size_is_seen(tagger: Tagger, size: tuple[int, int]) -> None:
    assert tagger.prepare(np.zeros((*size, 3), np.uint8)).shape == (3, 224, 224)


def test_a_column_of_tags(tmp_path: Path, tagger: Tagger) -> None:
    corpus = start(tmp_path / "corpus")
    columns = {"captions/tags": {"tags": "efficientnet-lite0", "probability": 0.05}}
    columns["captions/sure"] = {"tags": "efficientnet-lite0", "probability": 0.99}
    made = make(corpus, columns)
    check_rows(corpus, made["captions/tags"], "images")
    found = {line["key"]: line for line in lines(corpus, made["captions/tags"]) if line["reason"] != "upstream"}
    captions = [line["caption"] for line in found.values() if line["status"] == "ok"]
    assert captions and {tag for caption in captions for tag in caption.split(", ")} <= set(tagger.names)
    unsure = lines(corpus, made["captions/sure"])
    assert {line["reason"] for line in unsure if line["reason"] != "upstream"} == {"no_tag"}
    stage = corpus.column("captions/tags").made_by
    assert stage["model"] == tagger_fingerprint("efficientnet-lite0") and stage["kind"] == "tags"
