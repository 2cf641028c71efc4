"""Untrusted images: every kind comes out as RGB or with a reason; nothing that the decoders throw gets out."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import BadImage, decode, encode, prepare, resize, short_side_size
from microdit.pipeline.content.jpeg import count_scans

OPTIONS = ImageOptions(min_side=8, max_side=64)
PIXELS = 1_000_000
REASONS = {"not_an_image", "truncated", "damaged", "bomb", "too_small", "too_long", "animated"}


def picture(width: int = 40, height: int = 24) -> Image.Image:
    """A smooth picture whose corners tell which way is up: red, green, blue, white, clockwise from the top left."""
    corners = np.array([[[255, 0, 0], [0, 255, 0]], [[255, 255, 255], [0, 0, 255]]], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def far(found: np.ndarray, wanted: Image.Image) -> float:
    """The mean absolute difference."""
    reference = np.asarray(wanted.convert("RGB")).astype(float)
    assert found.shape == reference.shape
    assert found.dtype == np.uint8
    return float(np.abs(found - reference).mean())


FORMATS = {
    "jpeg": saved(picture(), "JPEG", quality=95, subsampling=0),
    "progressive": saved(picture(), "JPEG", quality=95, progressive=True),
    "png": saved(picture(), "PNG"),
    "webp": saved(picture(), "WEBP", lossless=True),
    "avif": saved(picture(), "AVIF", quality=95),
    "gif": saved(picture(), "GIF"),
    "bmp": saved(picture(), "BMP"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_pixels(name: str):
    found = decode(FORMATS[name], PIXELS)
    assert (found.width, found.height) == (40, 24)
    assert found.format == {"progressive": "jpeg"}.get(name, name)
    assert far(found.pixels, picture()) < 12  # a GIF has 256 colours


MODES = {
    "gray": (saved(picture().convert("L"), "PNG"), picture().convert("L"), True),
    "gray jpeg": (saved(picture().convert("L"), "JPEG", quality=95), picture().convert("L"), True),
    "one bit": (saved(picture().convert("1"), "PNG"), picture().convert("1"), False),
    "palette": (saved(picture().convert("P"), "PNG"), picture().convert("P").convert("RGB"), False),
    "cmyk": (saved(picture().convert("CMYK"), "JPEG", quality=95, subsampling=0), picture(), False),
    "16 bits": (
        saved(Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257), "PNG"),
        picture().convert("L"),
        False,
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name: str):
    data, wanted, plain = MODES[name]
    found = decode(data, PIXELS)
    assert far(found.pixels, wanted) < 3
    assert found.plain is plain


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_lies_on_white(mode: str, format: str):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    found = decode(saved(image.convert(mode), format, lossless=True), PIXELS)
    assert (found.pixels[:, :16] < 4).all()
    assert (found.pixels[:, 16:] > 251).all()
    assert not found.plain


def test_a_transparent_colour_of_a_png_lies_on_white():
    image = Image.new("RGB", (16, 16), (10, 20, 30))
    found = decode(saved(image, "PNG", transparency=(10, 20, 30)), PIXELS)
    assert (found.pixels == 255).all()
    assert not found.plain


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_undone(orientation: int, format: str):
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    image = picture()
    for turn in stored:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, format, quality=95, exif=exif.tobytes())
    found = decode(data, PIXELS)
    assert (found.width, found.height) == (40, 24)
    assert far(found.pixels, picture()) < 6
    assert found.plain is (orientation == 1)
    kept = prepare(data, ImageOptions(min_side=8, format={"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[format]))
    assert (kept.data == data) is (orientation == 1)
    assert far(decode(kept.data, PIXELS).pixels, picture()) < 7


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_fault_of_the_picture():
    data = saved(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage")
    assert decode(data, PIXELS).plain


def test_bytes_are_kept_unless_something_must_change():
    jpeg = FORMATS["jpeg"]
    found = prepare(jpeg, OPTIONS)
    assert found.data is jpeg
    assert (found.width, found.height, found.original_width, found.original_height) == (40, 24, 40, 24)
    assert prepare(FORMATS["png"], ImageOptions(min_side=8, format="png")).data == FORMATS["png"]
    assert prepare(FORMATS["png"], OPTIONS).data != FORMATS["png"]


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_members_are_what_they_are_called(format: str):
    found = prepare(FORMATS["bmp"], ImageOptions(min_side=8, format=format))
    with Image.open(io.BytesIO(found.data)) as image:
        assert image.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[format]
        assert far(np.asarray(image), picture()) < 3
    assert found.format == "bmp"


def test_jpegs_are_encoded_without_loss_of_colour():
    data = encode(np.asarray(picture()), ImageOptions(quality=95))
    with Image.open(io.BytesIO(data)) as image:
        assert [part[1:3] for part in image.layer] == [(1, 1)] * 3  # 4:4:4
    assert data == encode(np.asarray(picture()), ImageOptions(quality=95))


@pytest.mark.parametrize("size", [(400, 240), (240, 400), (64, 64), (65, 200), (1000, 700)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_long_short_side_is_reduced(size: tuple[int, int], format: str):
    found = prepare(saved(picture(*size), format, quality=95), OPTIONS)
    assert min(found.width, found.height) == 64
    assert (found.original_width, found.original_height) == size
    assert (found.width, found.height) == short_side_size(*size, 64)
    assert abs(found.width / found.height - size[0] / size[1]) < 0.04
    wanted = picture(*size).resize((found.width, found.height), Image.Resampling.BICUBIC)
    assert far(decode(found.data, PIXELS).pixels, wanted) < 2


@pytest.mark.parametrize("size", [(900, 750), (901, 751), (1203, 777)])
def test_a_reduced_decode_is_as_good_as_a_whole_one(size: tuple[int, int]):
    noise = np.random.default_rng(0).integers(60, 190, (30, 40, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), "JPEG", quality=95)
    assert decode(data, PIXELS, shrink_to=150).pixels.shape[0] < size[1] / 2
    found = decode(data, PIXELS, shrink_to=150).resized(short_side_size(*size, 150))
    wanted = resize(decode(data, PIXELS).pixels, short_side_size(*size, 150))
    assert 10 * np.log10(255**2 / np.mean((found.astype(float) - wanted) ** 2)) > 42


@pytest.mark.parametrize("size", [(320, 260), (640, 480), (810, 643)])
def test_fine_text_is_as_good_as_from_a_whole_decode(size: tuple[int, int]):
    image = Image.new("RGB", size, "white")
    lines = "\n".join("the quick brown fox jumps over the lazy dog " * 4 for _ in range(60))
    ImageDraw.Draw(image).multiline_text((2, 2), lines, "black", ImageFont.load_default(max(10, size[0] // 40)))
    data = saved(image, "JPEG", quality=95, subsampling=0)
    found = decode(prepare(data, ImageOptions(min_side=8, max_side=128, format="png")).data, PIXELS).pixels
    wanted = resize(decode(data, PIXELS).pixels, short_side_size(*size, 128))
    assert np.mean((found.astype(float) - wanted) ** 2) < 255**2 / 10**3.7  # 37 dB


@pytest.mark.parametrize("size", [(1000, 800), (801, 2000), (640, 640)])
def test_a_fast_reduction_is_near_the_sharp_one(size: tuple[int, int]):
    noise = np.random.default_rng(0).integers(0, 255, (9, 11, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), "JPEG", quality=95)
    sharp = prepare(data, ImageOptions(max_side=256))
    fast = prepare(data, ImageOptions(max_side=256, reduce="fast"))
    assert (fast.width, fast.height) == (sharp.width, sharp.height)
    assert fast.data != sharp.data
    a, b = (np.asarray(Image.open(io.BytesIO(made.data)), np.float64) for made in (sharp, fast))
    assert 10 * np.log10(255**2 / np.mean((a - b) ** 2)) > 40


def test_the_short_side_decides_what_is_too_small():
    for size in ((7, 100), (100, 7)):
        with pytest.raises(BadImage, match="8 pixels") as error:
            prepare(saved(picture(*size), "PNG"), OPTIONS)
        assert error.value.reason == "too_small"
    assert prepare(saved(picture(8, 100), "PNG"), OPTIONS).width == 8


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"<!doctype html><html></html>", b"%PDF-1.7", b"\0" * 1000, b"GIF", b"RIFF\4\0\0\0WAVE"]
)
def test_what_is_no_image(data: bytes):
    with pytest.raises(BadImage) as error:
        decode(data, PIXELS)
    assert error.value.reason == "not_an_image"


@pytest.mark.parametrize("name", ["jpeg", "progressive", "png", "webp", "avif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_is_cut_off_is_truncated(name: str, share: float):
    big = picture(300, 200)
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    image = Image.blend(big, Image.fromarray(noise), 0.2)
    whole = {
        "jpeg": saved(image, "JPEG"),
        "progressive": saved(image, "JPEG", progressive=True),
        "png": saved(image, "PNG"),
        "webp": saved(image, "WEBP"),
        "avif": saved(image, "AVIF"),
    }[name]
    assert decode(whole, PIXELS).width == 300
    with pytest.raises(BadImage) as error:
        decode(whole[: int(len(whole) * share)], PIXELS)
    assert error.value.reason == "truncated"


INTERLACED = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png_header(width: int, height: int, interlaced: int = 0, body: bytes = b"\0" * 1000) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(saved(picture(16, 16), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png_header(30_000, 30_000),
        png_header(2**31 - 1, 2**31 - 1),
        jpeg_header(65_500, 65_500),
        saved(Image.new("1", (2000, 2000)), "PNG"),
        saved(Image.new("L", (2000, 2000)), "GIF"),
        saved(Image.new("RGB", (2000, 2000)), "WEBP"),
        saved(Image.new("RGB", (2000, 2000)), "AVIF"),
    ],
    ids=["png", "png of all", "jpeg", "one bit", "gif", "webp", "avif"],
)
def test_too_many_pixels_are_not_decoded(data: bytes):
    with pytest.raises(BadImage) as error:
        decode(data, PIXELS)
    assert error.value.reason == "bomb"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_a_png_with_fewer_rows_than_its_header_tells_of_is_truncated(mode: str):
    image = Image.new("I;16", (37, 24)) if mode == "I;16" else Image.new(mode, (37, 24))  # black rows are no fault
    data = bytearray(saved(image, "PNG"))
    assert decode(bytes(data), PIXELS).height == 24
    struct.pack_into(">I", data, 20, 25)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    with pytest.raises(BadImage, match="37x25") as error:
        decode(bytes(data), PIXELS)
    assert error.value.reason == "truncated"


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 9), (16, 8), (37, 24)])
def test_an_interlaced_png_is_whole_if_its_passes_are(size: tuple[int, int]):
    width, height = size
    rows = b""
    for x, y, across, down in INTERLACED:
        if (columns := len(range(x, width, across))) > 0:
            rows += (b"\0" + b"\x50" * 3 * columns) * len(range(y, height, down))
    for body, whole in ((rows, True), (rows[:-1], False)):
        data = png_header(width, height, interlaced=1, body=body)
        if whole:
            assert (decode(data, PIXELS).pixels == 0x50).all()
        else:
            with pytest.raises(BadImage) as error:
                decode(data, PIXELS)
            assert error.value.reason == "truncated"


def test_a_jpeg_of_a_thousand_scans_is_not_decoded():
    data = FORMATS["progressive"]
    scan = data.rindex(b"\xff\xda")
    bomb = data[:scan] + data[scan:-2] * 1000 + data[-2:]
    with pytest.raises(BadImage, match="scans") as error:
        decode(bomb, PIXELS)
    assert error.value.reason == "bomb"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animations_are_refused(format: str):
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    with pytest.raises(BadImage) as error:
        decode(data, PIXELS)
    assert error.value.reason == "animated"


def test_stray_bytes_before_the_end_of_a_whole_jpeg_do_no_harm():
    data = FORMATS["jpeg"]
    found = decode(data[:-2] + b"\x17\x00\x11" + data[-2:], PIXELS)
    assert (found.pixels == decode(data, PIXELS).pixels).all()


def test_a_damaged_jpeg_is_refused_even_where_it_could_be_guessed():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = bytearray(saved(Image.fromarray(noise), "JPEG", restart_marker_blocks=2))
    first = data.index(b"\xff\xd1")
    data[first + 1] = 0xD5  # another restart marker than the one whose turn it is
    with pytest.raises(BadImage) as error:
        decode(bytes(data), PIXELS)
    assert error.value.reason == "damaged"


def test_a_side_that_its_format_cannot_write_is_refused():
    strip = saved(Image.new("RGB", (66_000, OPTIONS.min_side)), "PNG")
    with pytest.raises(BadImage, match="65500") as error:
        prepare(strip, OPTIONS)
    assert error.value.reason == "too_long"
    strip = saved(Image.new("RGB", (17_000, OPTIONS.min_side)), "PNG")
    with pytest.raises(BadImage, match="16383"):
        prepare(strip, OPTIONS.model_copy(update={"format": "webp"}))


@given(st.lists(st.sampled_from(b"\xff\xda\x00\x07"), max_size=40).map(bytes))
def test_scans_are_counted_as_bytes_count_them(data: bytes):
    assert count_scans(data) == data.count(b"\xff\xda")


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 2**32), st.sampled_from(["cut", "flip", "join", "drop"]))
def test_damaged_images_give_a_picture_or_a_reason(name: str, seed: int, damage: str):
    rng = random.Random(seed)
    data = bytearray(FORMATS[name])
    if damage == "cut":
        del data[rng.randrange(len(data)) :]
    elif damage == "drop":
        start = rng.randrange(len(data))
        del data[start : start + rng.randrange(1, 50)]
    elif damage == "join":
        data = data[: rng.randrange(len(data))] + FORMATS[rng.choice(sorted(FORMATS))][rng.randrange(100) :]
    else:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        found = prepare(bytes(data), OPTIONS)
    except BadImage as error:
        assert error.reason in REASONS
        assert str(error)
    else:
        again = decode(found.data, OPTIONS.max_pixels)
        assert (again.width, again.height) == (found.width, found.height)
        assert min(found.width, found.height) >= OPTIONS.min_side
