"""Odd kinds of sound pictures, written byte by byte, against pixels that are worked out by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import BadImage, decode, prepare

WIDTH, HEIGHT = 40, 24
COLOURS = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
BASE = np.asarray(Image.fromarray(COLOURS).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
ALPHA = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
ON_WHITE = BASE * (ALPHA[..., None] / 255) + 255.0 - ALPHA[..., None]
GREY = np.repeat(BASE[..., 1:2], 3, axis=2)
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def saved(pixels: np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def check(data: bytes, wanted: np.ndarray, off: float = 1.0) -> None:
    found = prepare(data, ImageOptions(min_side=8, format="png"))
    pixels = decode(found.data, 10**6).pixels
    assert pixels.shape == wanted.shape
    assert np.abs(pixels - wanted.astype(float)).mean() <= off


# -- PNG ---------------------------------------------------------------------------------------------------------------
def rows(samples: np.ndarray, depth: int) -> bytes:
    packed = []
    for row in samples.reshape(len(samples), -1):
        if depth == 16:
            packed.append(row.astype(">u2").tobytes())
        else:
            packed.append(np.packbits((row[:, None] >> np.arange(depth - 1, -1, -1)) & 1).tobytes())
    return b"".join(b"\0" + row for row in packed)


def png(samples: np.ndarray, depth: int, kind: int, interlaced: bool, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [samples[y::down, x::across] for x, y, across, down in PASSES] if interlaced else [samples]
    header = struct.pack(">2I5B", samples.shape[1], samples.shape[0], depth, kind, 0, 0, interlaced)
    body = zlib.compress(b"".join(rows(part, depth) for part in parts))
    made = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")):
        made += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return made


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["grey", "palette", "clear palette", "colour", "grey alpha", "alpha"])
def test_a_png_of_every_kind_and_depth(kind: str, depth: int, interlaced: bool):
    most, alpha = (1 << depth) - 1, ALPHA[..., None]
    if kind == "grey":
        samples = BASE[..., 1:2].astype(int) * most // 255
        check(png(samples, depth, 0, interlaced), np.broadcast_to(samples * 255 / most, BASE.shape))
    elif "palette" in kind and depth <= 8:
        colours = np.random.default_rng(2).integers(0, 256, (most + 1, 3), dtype=np.uint8)
        samples = ALPHA[..., None].astype(int) % (most + 1)
        clear = [(b"tRNS", b"\0")] if kind == "clear palette" else []  # of the first colour alone
        wanted = np.where((samples == 0) & bool(clear), 255, colours[samples[..., 0]])
        check(png(samples, depth, 3, interlaced, (b"PLTE", colours.tobytes()), *clear), wanted)
    elif depth >= 8 and "palette" not in kind:
        scale, grey = most // 255, BASE[..., 1:2].astype(int)
        samples, number, wanted = {
            "colour": (BASE.astype(int), 2, BASE),
            "grey alpha": (np.concatenate([grey, alpha], 2), 4, GREY * (alpha / 255) + 255.0 - alpha),
            "alpha": (np.concatenate([BASE.astype(int), alpha], 2), 6, ON_WHITE),
        }[kind]
        check(png(samples * scale, depth, number, interlaced), wanted)


# -- TIFF --------------------------------------------------------------------------------------------------------------
def tiff(order: str, parts: list[bytes], tags: dict[int, tuple[int, ...]], tiled: bool = False) -> bytes:
    """Write a TIFF of one page, numbers of 32 bits; the parts are strips or tiles."""
    tags = tags | {256: (WIDTH,), 257: (HEIGHT,), 259: (1,), (325 if tiled else 279): tuple(map(len, parts))}
    place = 324 if tiled else 273
    size = 8 + 2 + 12 * (len(tags) + 1) + 4
    begin = size + sum(4 * len(v) for v in tags.values() if len(v) > 1) + (4 * len(parts) if len(parts) > 1 else 0)
    tags[place] = tuple(begin + sum(map(len, parts[:number])) for number in range(len(parts)))
    entries, beyond = b"", b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            beyond, packed = beyond + packed, struct.pack(order + "I", size + len(beyond))
        entries += struct.pack(order + "HHI", tag, 4, len(values)) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return head + entries + bytes(4) + beyond + b"".join(parts)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_every_layout(order: str):
    colours = {258: (8, 8, 8), 262: (2,), 277: (3,), 278: (HEIGHT,)}
    check(tiff(order, [BASE.tobytes()], colours), BASE)
    check(tiff(order, [BASE[..., each].tobytes() for each in range(3)], colours | {284: (2,)}), BASE)
    wide = np.zeros((32, 48, 3), np.uint8)
    wide[:HEIGHT, :WIDTH] = BASE
    tiles = [wide[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16, 32)]
    check(tiff(order, tiles, colours | {322: (16,), 323: (16,)}, tiled=True), BASE)
    check(tiff(order, [BASE.tobytes()], colours | {274: (3,)}), BASE[::-1, ::-1])
    check(tiff(order, [BASE.tobytes()], colours | {274: (6,)}), BASE[::-1].transpose(1, 0, 2))
    deep = BASE.astype(int) * 257
    check(tiff(order, [deep.astype(order + "u2").tobytes()], colours | {258: (16, 16, 16)}), BASE)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("white", [0, 1])
def test_a_grey_tiff_whose_zero_is_white_or_black(depth: int, white: int):
    grey = BASE[..., 1].astype(int) * (257 if depth == 16 else 1)
    tags = {258: (depth,), 262: (white,), 277: (1,), 278: (HEIGHT,)}
    check(tiff("<", [grey.astype(f"<u{depth // 8}").tobytes()], tags), GREY if white else 255 - GREY)


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_tiff_with_a_fourth_sample(extra: int):
    first = np.round(BASE * (ALPHA[..., None] / 255)) if extra == 1 else BASE  # 1: multiplied already
    samples = np.concatenate([first, ALPHA[..., None]], 2).astype(np.uint8)
    tags = {258: (8,) * 4, 262: (2,), 277: (4,), 278: (HEIGHT,), 338: (extra,)}
    check(tiff("<", [samples.tobytes()], tags), ON_WHITE if extra else BASE, 3)


# -- JPEG --------------------------------------------------------------------------------------------------------------
def segment(name: int, body: bytes) -> bytes:
    return bytes([0xFF, name]) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("transform", [1, 2, 7])
def test_a_jpeg_whose_adobe_segment_names_an_unknown_transform(transform: int):
    data = saved(BASE, "JPEG", quality=95, subsampling=0)
    end = 4 + int.from_bytes(data[4:6], "big")  # of JFIF's segment
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))
    check(data[:2] + adobe + data[end:], BASE, 4)


def test_a_jpeg_with_segments_that_say_much():
    data = saved(BASE, "JPEG", quality=95, subsampling=0)
    note, small = segment(0xFE, b"c" * 65_000), saved(BASE[::4, ::4], "JPEG")
    check(data[:2] + 5 * note + data[2:], BASE, 4)
    check(data[:2] + b"\xff" * 9 + data[2:], BASE, 4)
    check(data[:20] + segment(0xE0, b"JFXX\0\x10" + small) + data[20:], BASE, 4)
    check(data + b"behind the end" * 9, BASE, 4)
    frame = data.index(b"\xff\xc0")
    for at, value in ((frame + 4, 12), (frame + 1, 0xC9), (frame + 1, 0xC3)):  # 12 bits, arithmetic, lossless
        with pytest.raises(BadImage):
            decode(data[:at] + bytes([value]) + data[at + 1 :], 10**6)
    with pytest.raises(BadImage):
        decode(data[: frame + 5] + b"\0\0" + data[frame + 7 :], 10**6)  # the height comes behind the scan


# -- BMP, GIF ----------------------------------------------------------------------------------------------------------
def bmp(bits: int, compression: int, body: bytes, masks: bytes = b"", down: bool = False, header: int = 40) -> bytes:
    height = -HEIGHT if down else HEIGHT
    info = struct.pack("<IiiHHIIiiII", header, WIDTH, height, 1, bits, compression, len(body), 0, 0, 0, 0)
    info = (info + masks).ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(body), 0, 0, 14 + len(info)) + info + body


def test_bmps_of_every_layout():
    turned = np.ascontiguousarray(BASE[..., ::-1])
    check(bmp(24, 0, turned[::-1].tobytes()), BASE)
    check(bmp(24, 0, turned.tobytes(), down=True), BASE)
    four = np.concatenate([turned, ALPHA[..., None]], 2)
    check(bmp(32, 0, four[::-1].tobytes()), BASE)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    check(bmp(32, 3, four[::-1].tobytes(), masks, header=108), ON_WHITE)
    red, green, blue = (BASE[..., each].astype(int) >> 3 for each in range(3))
    wanted = np.stack([red, green, blue], 2) * 255 / 31
    check(bmp(16, 0, (red << 10 | green << 5 | blue)[::-1].astype("<u2").tobytes()), wanted, 4)
    masks = struct.pack("<3I", 0xF800, 0x7E0, 0x1F)
    check(bmp(16, 3, (red << 11 | green << 6 | blue)[::-1].astype("<u2").tobytes(), masks), wanted, 4)


@pytest.mark.parametrize("interlaced", [0, 1])
def test_a_gif_with_a_palette_of_its_frame(interlaced: int):
    image = Image.fromarray(BASE).quantize(64)
    buffer = io.BytesIO()
    image.save(buffer, "GIF", interlace=interlaced, optimize=False)
    data = buffer.getvalue()
    end = 13 + 3 * (2 << (data[10] & 7))
    frame = data.index(b",", end)
    local = data[frame : frame + 9] + bytes([data[frame + 9] | 0x80 | (data[10] & 7)]) + data[13:end]
    made = data[:10] + bytes([data[10] & 0x7F]) + data[11:13] + data[end:frame] + local + data[frame + 10 :]
    check(made, np.asarray(image.convert("RGB")))
