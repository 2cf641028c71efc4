"""What is said about a picture does it no harm: profiles, orientation, texts, checksums; and pixels in flight."""

import io
import random
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.decoded import BadImage, PixelBudget
from microdit.pipeline.content.images import decode, prepare
from microdit.pipeline.content.orientation import orientation

PIXELS = 1_000_000
KEEP = {
    "JPEG": ImageOptions(min_side=8, format="jpg"),
    "PNG": ImageOptions(min_side=8, format="png"),
    "WEBP": ImageOptions(min_side=8, format="webp"),
}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(width: int = 40, height: int = 24) -> Image.Image:
    corners = np.array([[[255, 0, 0], [0, 255, 0]], [[255, 255, 255], [0, 0, 255]]], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes, wrong: bool = False) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ wrong)


def with_chunk(data: bytes, made: bytes, name: bytes = b"IDAT") -> bytes:
    """Put a chunk before another of a PNG."""
    at = data.index(name) - 4
    return data[:at] + made + data[at:]


def grey_png(rows: np.ndarray, depth: int, colour: int = 0, clear: bytes = b"") -> bytes:
    """Write a PNG of samples of any depth, without a filter."""
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = ((rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1).reshape(len(rows), -1)
        packed = [np.packbits(row).tobytes() for row in bits]
    header = struct.pack(">2I5B", rows.shape[1] // (3 if colour == 2 else 1), len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in packed))
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", clear) if clear else b"", chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4, 8, 16]), st.booleans(), st.integers(0, 2**32))
def test_the_transparent_colour_of_a_png_of_any_depth_is_white(depth: int, colours: bool, seed: int):
    colours = colours and depth >= 8
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 1 << depth, (9, 13 * (3 if colours else 1)))
    where = rows.reshape(9, 13, -1)
    clear = where[3, 5]
    data = grey_png(rows, depth, 2 if colours else 0, b"".join(struct.pack(">H", int(value)) for value in clear))
    found = decode(data, PIXELS)
    most = (1 << depth) - 1
    wanted = np.where(
        (where == clear).all(axis=2, keepdims=True), 255, where >> 8 if depth == 16 else where * 255 // most
    )
    assert (found.pixels == np.broadcast_to(wanted, (9, 13, 3))).all()
    assert not found.plain


METADATA = st.sampled_from([b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"pHYs", b"tIME", b"cHRM", b"prVt"])
BODIES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"Raw profile type exif\0\nexif\n  3\nzzz", b"XML:com.adobe.xmp\0\1\0\0\0?", b"a\0\0" + b"x" * 9]),
    st.binary(max_size=20).map(lambda tail: b"II*\0\x08\0\0\0" + tail),
    st.just(b"key\0\0" + zlib.compress(bytes(3 << 20))),
    st.just(b"key\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
)


@settings(max_examples=150, deadline=None)
@given(METADATA, BODIES, st.booleans(), st.booleans())
def test_no_chunk_beside_the_picture_of_a_png_can_cost_it(name: bytes, body: bytes, wrong: bool, behind: bool):
    whole = saved(picture(), "PNG")
    data = with_chunk(whole, chunk(name, body, wrong), b"IEND" if behind else b"IDAT")
    found = decode(data, PIXELS)
    assert (found.pixels == np.asarray(picture())).all()
    kept = prepare(data, KEEP["PNG"]).data
    with Image.open(io.BytesIO(kept)) as image:  # what is kept as it came can be read by anybody
        assert (np.asarray(ImageOps.exif_transpose(image)) == np.asarray(picture())).all()
    assert kept != data or not wrong


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("begin", [b"\0\x08\0\2", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff\x12\1\3"])
def test_exif_data_that_are_none_do_no_harm(format: str, begin: bytes):
    exif = Image.Exif()
    exif[0x010E] = "a picture of four colours"
    whole = exif.tobytes()[6:]
    data = saved(picture(), format, quality=95, exif=exif.tobytes())
    assert data.count(whole) == 1
    at = data.index(whole)
    data = data[:at] + begin + data[at + len(begin) :]
    found = decode(data, PIXELS)
    assert (found.width, found.height) == (40, 24)
    assert np.abs(found.pixels - np.asarray(picture()).astype(float)).mean() < 6


@given(st.binary(max_size=120), st.binary(max_size=60))
def test_any_bytes_have_an_orientation(exif: bytes, xmp: bytes):
    for begin in (b"", b"Exif\0\0II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"):
        assert orientation(begin + exif, xmp) in range(1, 9)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["<", ">"]), st.sampled_from([1, 3, 4, 5, 9]))
def test_exif_comes_before_xmp_whatever_the_type(by_exif: int, by_xmp: int, order: str, kind: int):
    begin = b"II*\0" if order == "<" else b"MM\0*"
    form = {1: "B3x", 3: "H2x", 4: "I", 5: "I", 9: "i"}[kind]
    value = struct.pack(order + form, 26 if kind == 5 else by_exif)
    entry = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    exif = begin + struct.pack(order + "IH", 8, 1) + entry + bytes(4) + struct.pack(order + "II", 2 * by_exif, 2)
    xmp = f'<rdf:Description tiff:Orientation="{by_xmp}"/>'.encode()
    assert orientation(exif, xmp) == (by_exif if 1 <= by_exif <= 8 else 1)
    assert orientation(b"", xmp) == (by_xmp if 1 <= by_xmp <= 8 else 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", [3, 6])
def test_xmp_alone_turns_a_picture_in_every_format(format: str, turn: int):
    xmp = f"<x><tiff:Orientation>{turn}</tiff:Orientation></x>".encode()
    plain = saved(picture(), format, quality=95)
    if format == "PNG":
        data = with_chunk(plain, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    elif format == "JPEG":
        segment = b"http://ns.adobe.com/xap/1.0/\0" + xmp
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]
    else:
        data = saved(picture(), format, quality=95, xmp=xmp)
    found = decode(data, PIXELS)
    assert (found.width, found.height) == ((24, 40) if turn == 6 else (40, 24))
    assert not found.plain
    with Image.open(io.BytesIO(prepare(data, KEEP[format]).data)) as image:
        assert ImageOps.exif_transpose(image).size == image.size == (found.width, found.height)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_bytes_are_kept_where_the_profile_is_srgb(format: str):
    data = saved(picture(), format, icc_profile=SRGB)
    assert prepare(data, KEEP[format]).data == data
    broken = saved(picture(), format, icc_profile=SRGB[:300] + bytes(288))
    found = prepare(broken, KEEP[format])
    assert (found.data == broken, found.profile) == (False, "ignored")
    assert np.abs(decode(found.data, PIXELS).pixels - np.asarray(picture()).astype(float)).mean() < 6


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_are_converted_before_they_are_laid_on_white(alpha: bool):
    adobe = decode_profile()
    image = Image.new("RGBA" if alpha else "RGB", (16, 16), (0, 200, 0))
    if alpha:
        image.putalpha(Image.new("L", (16, 8), 0).resize((16, 16)))
    found = decode(saved(image, "PNG", icc_profile=adobe), PIXELS)
    assert found.profile == "converted"
    assert tuple(found.pixels[0, 0]) == ((255, 255, 255) if alpha else tuple(found.pixels[8, 8]))
    if not alpha:
        assert found.pixels[0, 0, 0] == 0
        assert found.pixels[0, 0, 1] > 199  # the green of AdobeRGB is beyond that of sRGB


def decode_profile() -> bytes:
    """The profile of one of the cases."""
    from tests.pipeline.content.test_image_cases import CASES

    with Image.open(CASES / "i-adobergb-jpg.jpg") as image:
        return image.info["icc_profile"]


def test_a_png_with_a_wrong_checksum_is_made_again_and_one_with_wrong_pixels_refused():
    rows = np.random.default_rng(0).integers(0, 256, (24, 120))
    data = bytearray(grey_png(rows, 8, 2))
    end = data.index(b"IEND") - 4
    data[end - 1] ^= 1
    kept = prepare(bytes(data), KEEP["PNG"]).data
    assert kept != data
    assert (decode(kept, PIXELS).pixels == rows.reshape(24, 40, 3)).all()
    stored = zlib.compress(b"".join(b"\0" + bytes(row.astype(np.uint8)) for row in rows), 0)
    at = data.index(b"IDAT") - 4
    body = bytearray(stored)
    body[200] ^= 16  # a pixel
    data[at:end] = chunk(b"IDAT", bytes(body), wrong=True)
    with pytest.raises(BadImage) as error:
        decode(bytes(data), PIXELS)
    assert error.value.reason == "damaged"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["zeros", "ones", "few"]), st.integers(1, 3000))
def test_padding_before_the_end_of_a_jpeg_is_no_damage(seed: int, kind: str, count: int):
    rng = random.Random(seed)
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((rng.randrange(8, 90), rng.randrange(8, 90)), Image.Resampling.BICUBIC)
    format = rng.choice([{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}, {"restart_marker_rows": 1}])
    mode = rng.choice(["RGB", "RGB", "L", "CMYK"])
    data = saved(image.convert(mode), "JPEG", quality=rng.choice([30, 75, 95]), **format)
    filling = {
        "zeros": bytes(count),
        "ones": b"\xff" * count,
        "few": bytes(rng.randrange(255) for _ in range(count % 4 + 1)),
    }
    found = decode(data[:-2] + filling[kind] + data[-2:], PIXELS)
    assert (found.pixels == decode(data, PIXELS).pixels).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_scan_that_has_lost_its_place_is_refused(mode: str, progressive: bool):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((480, 320), Image.Resampling.BICUBIC)
    data = saved(image.convert(mode), "JPEG", progressive=progressive)
    good, scan = decode(data, PIXELS).pixels.astype(int), data.index(b"\xff\xda") + 14
    accepted = 0
    for seed in range(120):
        rng = random.Random(f"{seed}/{mode}")
        at, count = rng.randrange(scan, len(data) - 2), rng.choice([64, 200, 1000])
        put = rng.choice([rng.randbytes(count), data[at : at + count], data[:count], bytes(count)])
        changed = data[:at] + put + data[at + rng.choice([0, count]) : -2] + data[-2:]
        try:
            found = decode(changed, PIXELS).pixels
        except BadImage:
            continue
        accepted += bool((np.abs(found - good).max(axis=2) > 8).mean() > 0.1) if found.shape == good.shape else True
    assert accepted <= 8  # those that found their place again in time: no decoder can tell


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_zeroed_block_of_a_jpeg_is_damage_and_a_flat_picture_is_none(subsampling: int):
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise).resize((480, 320), Image.Resampling.BICUBIC), "JPEG", subsampling=subsampling)
    for at in range(data.index(b"\xff\xda") + 20, len(data) - 600, 997):
        with pytest.raises(BadImage):
            decode(data[:at] + bytes(512) + data[at + 512 :], PIXELS)
    for colour in ("white", "gray", "black"):
        for options in ({}, {"optimize": True}, {"progressive": True}):
            flat = Image.new("RGB", (900, 700), colour)
            for mode in ("RGB", "L", "CMYK"):
                whole = saved(flat.convert(mode), "JPEG", subsampling=subsampling, **options)
                assert np.ptp(decode(whole, PIXELS).pixels) == 0


def test_a_gif_frame_smaller_than_its_screen_lies_on_white():
    small = saved(Image.new("P", (8, 8), 1), "GIF")
    data = bytearray(small)
    struct.pack_into("<2H", data, 6, 20, 16)  # the screen
    found = decode(bytes(data), PIXELS).pixels
    assert found.shape == (16, 20, 3)
    assert (found[8:] == 255).all()
    assert (found[:, 8:] == 255).all()


def test_large_pictures_go_alone_and_are_not_overtaken():
    budget, order, most = PixelBudget(100), [], []
    held = [0]
    lock = threading.Lock()

    def work(pixels: int) -> None:
        with budget.hold(pixels):
            with lock:
                held[0] += pixels
                most.append(held[0])
                order.append(pixels)
            time.sleep(0.02)
            with lock:
                held[0] -= pixels

    threads = [threading.Thread(target=work, args=(pixels,)) for pixels in (40, 40, 300, 40, 60, 90)]
    for thread in threads:
        thread.start()
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert sorted(order) == [40, 40, 40, 60, 90, 300]
    assert order.index(300) <= 3
    assert max(most) == 300
    assert all(each <= 100 for each in most if each != 300)


def test_a_picture_with_alpha_is_the_same_in_bands(monkeypatch: pytest.MonkeyPatch):
    image = picture(61, 47).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = saved(image, "PNG")
    whole = decode(data, PIXELS).pixels
    monkeypatch.setattr("microdit.pipeline.content.colour.BAND", 300)
    assert (decode(data, PIXELS).pixels == whole).all()
