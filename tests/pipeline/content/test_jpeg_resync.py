"""JPEGs whose scan lost synchronisation for a while are refused by ingest; sound ones of every sort are not."""

import io
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from benchmarks.sound_pictures import SORTS
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import BadImage, decode, prepare
from microdit.pipeline.content.jpeg_entropy import scan_fault
from microdit.pipeline.content.jpeg_header import baseline_header
from microdit.pipeline.content.jpeg_scan import end_of_scans

KEEP = ImageOptions(min_side=8, max_side=None)


def textured(seed: int, width: int = 400, height: int = 320) -> Image.Image:
    """A picture of large and small forms, as photographs have them."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (-(-height // grain), -(-width // grain), 3), dtype=np.uint8)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
        ).astype(float)
        for grain in (100, 25, 8, 2)
    ]
    mixed = 1.6 * (0.5 * layers[0] + 0.3 * layers[1] + 0.15 * layers[2] + 0.05 * layers[3]) - 75
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def begin_of_scan(data: bytes) -> int:
    header = baseline_header(data)
    assert header is not None
    return header.begin


@pytest.mark.parametrize("kind", ["420", "444", "gray", "cmyk"])
def test_scans_that_find_their_place_again_are_refused(kind: str):
    subsampling = {"444": 0, "420": 2}.get(kind, -1)
    unseen = seen = 0
    for seed in range(6):
        image = textured(seed).convert({"gray": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
        data = saved(image, quality=80, **({"subsampling": subsampling} if subsampling >= 0 else {}))
        right, rng = decode(data, 10**6).pixels.astype(int), random.Random(f"{seed}/{kind}")
        assert (prepare(data, KEEP).data == data) is (kind != "cmyk")
        for _ in range(40):
            at = rng.randrange(begin_of_scan(data), len(data) * 3 // 4)
            changed = data[:at] + rng.randbytes(count := rng.choice([1, 20])) + data[at + count :]
            try:
                plain = decode(changed, 10**6).pixels
            except BadImage:
                continue
            if (np.abs(plain - right).max(axis=2) > 16).mean() < 0.1:
                continue
            seen += 1
            try:
                prepare(changed, KEEP)
                unseen += 1
            except BadImage as error:
                assert error.reason == "damaged"
    assert seen >= 3
    assert unseen <= 0.8 * seen  # of photographs, a third: what is coded as any picture is, no reader can refuse


def drawing(rng: random.Random) -> Image.Image:
    """Rectangles and text on the grid of the blocks, tiles, gradients, noise: what is most like a seam."""
    width, height = rng.randrange(80, 400), rng.randrange(80, 400)
    image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    draw, grid = ImageDraw.Draw(image), rng.choice([1, 8, 16])
    for _ in range(rng.randrange(1, 25)):
        x, y = rng.randrange(width) // grid * grid, rng.randrange(height) // grid * grid
        box = (x, y, x + grid * rng.randrange(1, 60), y + grid * rng.randrange(1, 30))
        draw.rectangle(box, fill=tuple(rng.randrange(256) for _ in range(3)))
        if rng.random() < 0.3:
            draw.text((x, y), "a line of some words " * 3, "black", ImageFont.load_default(rng.choice([8, 12, 24])))
    if rng.random() < 0.3:  # a flat layer with one step
        row, column = rng.randrange(height // 16 - 1) * 16, rng.randrange(width // 16) * 16
        draw.rectangle((column, row, width, height), fill="navy")
        draw.rectangle((0, row + 16, width, height), fill="navy")
    if rng.random() < 0.3:
        image = Image.blend(image, textured(rng.getrandbits(32), width, height), rng.choice([0.1, 0.5, 0.9]))
    return image


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([10, 50, 85, 100]), st.sampled_from([0, 1, 2]), st.booleans())
def test_sound_pictures_are_none_of_those(seed: int, quality: int, subsampling: int, restarts: bool):
    rng = random.Random(seed)
    image = drawing(rng).convert(rng.choice(["RGB", "RGB", "L", "CMYK"]))
    options = {"restart_marker_rows": 1} if restarts else {}
    if image.mode == "RGB":
        options["subsampling"] = subsampling
    data = saved(image, quality=quality, optimize=rng.random() < 0.3, **options)
    assert (prepare(data, KEEP).data == data) is (image.mode != "CMYK")
    prepare(data, KEEP.model_copy(update={"max_side": 32}))
    header, end = baseline_header(data), end_of_scans(data)[0]
    assert header is not None
    assert end is not None
    assert scan_fault(data, header, end) is None


@settings(max_examples=48, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SORTS), st.sampled_from([30, 75, 95]), st.sampled_from([0, 2]))
def test_sound_pictures_that_look_most_like_damage_are_accepted(seed: int, sort, quality: int, subsampling: int):
    image = sort(random.Random(seed), lambda rng: textured(rng.getrandbits(32)))
    data = saved(image, quality=quality, subsampling=subsampling)
    assert prepare(data, KEEP).data == data


def test_means_out_of_range_and_bytes_left_are_faults():
    data = saved(textured(3), quality=80)
    header, end = baseline_header(data), end_of_scans(data)[0]
    assert header is not None
    assert end is not None
    padded = data[:end] + b"\x12\x34\x56\x78\x9a\xbc" + data[end:]
    assert scan_fault(padded, header, end + 6) == "6 bytes behind the last MCU"
    found = {
        scan_fault(data[:at] + b"\xa5" * 40 + data[at + 40 :], header, end) for at in range(header.begin, end, 997)
    }
    assert any(fault and "block means out of range" in fault for fault in found)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_no_bytes_break_the_reader(seed: int):
    rng = random.Random(seed)
    data = bytearray(saved(textured(1, 96, 80), quality=60))
    for _ in range(rng.randrange(1, 12)):
        data[rng.randrange(2, len(data))] = rng.randrange(256)
    header = baseline_header(bytes(data))
    if header is not None and header.width * header.height < 10**6:
        scan_fault(bytes(data), header, len(data) - 2)


def test_other_scans_are_left_to_the_decoder():
    assert baseline_header(saved(textured(0, 80, 80), progressive=True)) is None
    assert baseline_header(b"\xff\xd8\xff") is None
    assert baseline_header(b"\xff\xd8\xff\xc0\x00\x04") is None
