"""Files that people met: each comes out as its picture, or fails for its reason (tests/data/cases/images)."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import BadImage, decode, prepare

CASES = Path(__file__).parents[2] / "data" / "cases" / "images"
PIXELS = 1_000_000
PICTURES = sorted(path.name for path in CASES.glob("*") if "expected" not in path.name and path.name[:2] != "d-")
DAMAGED = {
    "d-jpg-insert200.jpg": "damaged",
    "d-jpg-chunkhead.jpg": "damaged",
    "d-jpg-flip19.jpg": "damaged",
    "d-cmyk-cut-eoi.jpg": "truncated",
    "d-cmyk-dup.jpg": "damaged",
}


def expected(name: str) -> np.ndarray | None:
    """The right picture, where the case has one."""
    path = (CASES / name).with_suffix(".expected.png")
    return np.asarray(Image.open(path)).astype(float) if path.exists() else None


@pytest.mark.parametrize("name", PICTURES)
def test_a_sound_file_gives_its_picture(name: str):
    data = (CASES / name).read_bytes()
    found = decode(data, PIXELS)
    wanted = expected(name)
    if wanted is not None:
        assert np.abs(found.pixels - wanted).mean() <= (3 if name.endswith("jpg") else 1)
    for format in ("jpg", "png", "webp"):
        kept = prepare(data, ImageOptions(min_side=8, format=format)).data
        with Image.open(io.BytesIO(kept)) as image:  # what is stored reads the same by anything
            assert not image.info.get("icc_profile")
            stored = np.asarray(ImageOps.exif_transpose(image).convert("RGB") if kept != data else image.convert("RGB"))
        assert np.abs(stored - found.pixels.astype(float)).mean() <= 3


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_scan_is_refused(name: str):
    with pytest.raises(BadImage) as error:
        decode((CASES / name).read_bytes(), PIXELS)
    assert error.value.reason == DAMAGED[name]


def test_where_no_alpha_is_set_at_all_a_bmp_is_opaque():
    found = decode((CASES / "b-bmp32v4-zero-alpha.bmp").read_bytes(), PIXELS).pixels
    assert found.std() > 20


def test_a_jpeg_that_xmp_alone_turns_is_turned():
    data = (CASES / "o-jpg-xmp6.jpg").read_bytes()
    found = decode(data, PIXELS)
    assert (found.width, found.height) == (320, 240)
    with Image.open(io.BytesIO(prepare(data, ImageOptions(min_side=8)).data)) as image:
        assert ImageOps.exif_transpose(image).size == image.size == (320, 240)


def test_what_became_of_a_profile_is_told():
    assert decode((CASES / "i-adobergb-jpg.jpg").read_bytes(), PIXELS).profile == "converted"
    assert decode((CASES / "i-big-png.png").read_bytes(), PIXELS).profile == "ignored"
    assert decode((CASES / "c-jpg-441.jpg").read_bytes(), PIXELS).profile == ""
