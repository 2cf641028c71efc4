"""Make what benchmarks/damage.py tries: pictures and archives of every kind, and the damage, by seed and number."""

import gzip
import io
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.sources.members import IMAGES

OPTIONS = ImageOptions(min_side=32, max_side=96)  # small, so that every way through `prepare` is taken
PER_ARCHIVE = 50
VARIANTS = 6  # pictures of each kind
NUMBERS = (0, 1, 2, 7, 255, 256, 4095, 10_000, 16_384, 32_768, 65_500, 65_535)
LARGE = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


# -- whole pictures --------------------------------------------------------------------------------------------------
def drawn(rng: random.Random) -> Image.Image:
    """Make an RGB picture: a colour run, noise of some grain, and a rectangle."""
    size = rng.choice([(48, 40), (120, 90), (90, 160), (333, 251), (24, 200), (260, 300)])
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    grain = rng.choice([1, 2, 8])
    rough = Image.fromarray(noise).reduce(grain).resize(size, Image.Resampling.BICUBIC)
    corners = Image.fromarray(noise[:2, :2]).resize(size, Image.Resampling.BILINEAR)
    image = Image.blend(corners, rough, rng.choice([0.1, 0.4, 0.8]))
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return image


def _alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _wide(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def _exif(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif.tobytes()


def _frames(image: Image.Image) -> dict[str, Any]:
    more = [image.transpose(Image.Transpose.ROTATE_180), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return {"save_all": True, "append_images": more, "duration": 100}


# each: how the picture is changed before it is saved, and the saving's options
Kind = tuple[str, Callable[[Image.Image], Image.Image], dict[str, Any]]

KINDS: dict[str, Kind] = {
    "jpeg": ("JPEG", lambda image: image, {"quality": 90}),
    "jpeg 4:4:4": ("JPEG", lambda image: image, {"quality": 95, "subsampling": 0}),
    "jpeg progressive": ("JPEG", lambda image: image, {"progressive": True}),
    "jpeg restarts": ("JPEG", lambda image: image, {"restart_marker_blocks": 3}),
    "jpeg gray": ("JPEG", lambda image: image.convert("L"), {}),
    "jpeg cmyk": ("JPEG", lambda image: image.convert("CMYK"), {}),
    "jpeg rotated": ("JPEG", lambda image: image, {"exif": _exif(6)}),
    "jpeg with icc": ("JPEG", lambda image: image, {"icc_profile": bytes(range(256)) * 300, "comment": b"c" * 999}),
    "png": ("PNG", lambda image: image, {}),
    "png gray": ("PNG", lambda image: image.convert("L"), {}),
    "png one bit": ("PNG", lambda image: image.convert("1"), {}),
    "png palette": ("PNG", lambda image: image.convert("P"), {}),
    "png palette clear": ("PNG", lambda image: image.convert("P"), {"transparency": 3}),
    "png 16 bits": ("PNG", _wide, {}),
    "png alpha": ("PNG", _alpha, {}),
    "png gray alpha": ("PNG", lambda image: _alpha(image).convert("LA"), {}),
    "png rotated": ("PNG", lambda image: image, {"exif": _exif(8)}),
    "png animated": ("PNG", lambda image: image, {"frames": True}),
    "webp": ("WEBP", lambda image: image, {}),
    "webp lossless": ("WEBP", lambda image: image, {"lossless": True}),
    "webp alpha": ("WEBP", _alpha, {}),
    "webp rotated": ("WEBP", lambda image: image, {"exif": _exif(3)}),
    "webp animated": ("WEBP", lambda image: image, {"frames": True}),
    "avif": ("AVIF", lambda image: image, {"speed": 9}),
    "avif alpha": ("AVIF", _alpha, {"speed": 9}),
    "avif animated": ("AVIF", lambda image: image, {"speed": 9, "frames": True}),
    "gif": ("GIF", lambda image: image, {}),
    "gif clear": ("GIF", lambda image: image.convert("P"), {"transparency": 5}),
    "gif animated": ("GIF", lambda image: image, {"frames": True}),
    "bmp": ("BMP", lambda image: image, {}),
    "bmp palette": ("BMP", lambda image: image.convert("P"), {}),
    "bmp alpha": ("BMP", _alpha, {}),
}


@cache
def whole_image(seed: int, kind: str, variant: int) -> tuple[bytes, str]:
    """Make an image as a tool writes it, and what must come of it: `ok`, `too_small` or `animated`."""
    image = drawn(random.Random(f"{seed}/{kind}/{variant}"))
    format, change, given = KINDS[kind]
    options = {name: value for name, value in given.items() if name != "frames"}
    buffer = io.BytesIO()
    image = change(image)
    image.save(buffer, format, **options, **(_frames(image) if "frames" in given else {}))
    small = "too_small" if min(image.size) < OPTIONS.min_side else "ok"
    return buffer.getvalue(), "animated" if "frames" in given else small


# -- damage ----------------------------------------------------------------------------------------------------------
def flip(data: bytearray, rng: random.Random) -> None:
    """Turn bits over; often near the beginning, where the headers are."""
    end = rng.choice([64, 1024, len(data)])
    for _ in range(rng.choice([1, 1, 3, 40])):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.choice([rng.randrange(len(data)), rng.randrange(min(100, len(data))), len(data) - 1]) :]


def drop(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice([1, 2, 4, 512, 4000])]


def zeros(data: bytearray, rng: random.Random) -> None:
    start, length = rng.randrange(len(data)), rng.choice([4, 100, 4096])
    data[start : start + length] = bytes(min(length, len(data) - start))


def noise(data: bytearray, rng: random.Random) -> None:
    start, length = rng.randrange(len(data)), rng.choice([4, 100, 4096])
    data[start : start + length] = rng.randbytes(min(length, len(data) - start))


def again(data: bytearray, rng: random.Random) -> None:
    """Repeat a piece several times."""
    start = rng.randrange(len(data))
    piece = bytes(data[start : start + rng.choice([2, 50, 1000])])
    data[start:start] = piece * rng.choice([1, 5, 60])


def lie(data: bytearray, rng: random.Random) -> None:
    """Falsify a length, a size or a type in a header, with the right checksum where there is one."""
    if data.startswith(b"\xff\xd8"):
        places = [
            at for at in range(2, min(len(data) - 12, 100_000)) if data[at] == 0xFF and 0xC0 <= data[at + 1] < 0xFF
        ]
        frames = [at for at in places if data[at + 1] in (0xC0, 0xC1, 0xC2)]
        at = rng.choice(frames if frames and rng.random() < 0.6 else places or [0])
        what = rng.choice([2, 5, 7, 9])  # the length, rows, columns; components and what follows them
        struct.pack_into(">H", data, at + what, rng.choice(NUMBERS))
    elif data.startswith(b"\x89PNG"):
        if rng.random() < 0.7:
            if rng.random() < 0.6:
                struct.pack_into(">I", data, rng.choice([16, 20]), rng.choice(NUMBERS + LARGE))
            else:
                data[rng.randrange(24, 29)] = rng.randrange(20)
            struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
        else:
            chunk = rng.choice([b"IDAT", b"IEND", b"PLTE", b"tRNS", b"acTL", b"fdAT", b"eXIf"])
            if (at := data.find(chunk)) >= 4:
                struct.pack_into(">I", data, at - 4, rng.choice(NUMBERS + LARGE))
    elif data.startswith(b"RIFF"):
        places = [4, 16, *(data.find(name) + 4 for name in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANMF", b"EXIF"))]
        at = rng.choice([at for at in places if at >= 4])
        if rng.random() < 0.5:
            at += rng.randrange(4, 16)
        struct.pack_into("<I", data, min(at, len(data) - 4), rng.choice(NUMBERS + LARGE))
    elif data.startswith(b"GIF"):
        inner = [at + rng.randrange(1, 10) for at in range(13, len(data) - 12) if data[at] == 0x2C]
        places = [6, 8, 10, *inner[:40]]
        struct.pack_into("<H", data, rng.choice(places), rng.choice(NUMBERS))
    elif data.startswith(b"BM"):
        struct.pack_into("<I", data, rng.choice([2, 10, 14, 18, 22, 26, 28, 30, 34, 46]), rng.choice(NUMBERS + LARGE))
    elif data[4:8] == b"ftyp":
        names = (b"ispe", b"pixi", b"av1C", b"iloc", b"iinf", b"iref", b"ipma", b"mdat", b"meta", b"moov", b"stsz")
        at = rng.choice([at for name in names if (at := data.find(name)) >= 4] or [4])
        struct.pack_into(">I", data, min(at + rng.choice([-4, 4, 8, 12]), len(data) - 4), rng.choice(NUMBERS + LARGE))
    elif data.startswith(b"PK"):
        at = rng.choice(_found(data, rng.choice([b"PK\1\2", b"PK\3\4", b"PK\5\6"])) or [0])
        place = min(at + rng.choice([6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 42]), len(data) - 4)
        struct.pack_into(
            *rng.choice([("<I", data, place, rng.choice(LARGE)), ("<H", data, place, rng.choice(NUMBERS))])
        )
    elif len(data) > 1024 and data[257:262] == b"ustar":
        places = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
        at = rng.choice(places)
        if rng.random() < 0.5:
            data[at + 124 : at + 136] = rng.choice(
                [b"%011o\0" % rng.choice(NUMBERS), b"77777777777\0", b"\x80" + b"\xff" * 11]
            )
        elif rng.random() < 0.5:
            data[at + 156] = rng.choice(b"0123456789SLKxgVDMN\0")
        else:
            data[at + rng.randrange(512)] = rng.randrange(256)
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    else:
        data[rng.randrange(min(20, len(data)))] = rng.randrange(256)


def _found(data: bytearray, text: bytes) -> list[int]:
    places, at = [], data.find(text)
    while at >= 0:
        places.append(at)
        at = data.find(text, at + 1)
    return places


DAMAGES: dict[str, Callable[[bytearray, random.Random], None]] = {
    "flip": flip,
    "cut": cut,
    "drop": drop,
    "zeros": zeros,
    "noise": noise,
    "again": again,
    "lie": lie,
}


def damaged(data: bytes, rng: random.Random, other: Callable[[], bytes]) -> tuple[bytes, str]:
    """Damage the data in one way, sometimes two; return how, `whole` if it was left alone."""
    if rng.random() < 0.06:
        return data, "whole"
    made, how = bytearray(data), []
    for _ in range(rng.choice([1, 1, 1, 2])):
        way = rng.choice(["splice", *DAMAGES, "lie"])
        how.append(way)
        if way == "splice":
            rest = other()
            made = made[: rng.randrange(len(made))] + rest[rng.randrange(len(rest)) :]
        elif made:
            DAMAGES[way](made, rng)
        if len(made) < 64:
            break
    return bytes(made), "+".join(how)


@dataclass(frozen=True)
class Item:
    """Something to be read."""

    kind: str
    damage: str
    data: bytes
    expected: str
    """Expected result if it is undamaged."""
    inside: int = 0
    """Of an archive: the members that are asked for."""
    whole: bytes = b""
    """The image file before it was damaged."""


def damaged_image(seed: int, number: int) -> Item:
    rng = random.Random(f"{seed}/image/{number}")

    def whole() -> tuple[str, tuple[bytes, str]]:
        kind = rng.choice(sorted(KINDS))
        return kind, whole_image(seed, kind, rng.randrange(VARIANTS))

    kind, (data, expected) = whole()
    made, how = damaged(data, rng, lambda: whole()[1][0])
    return Item(kind, how, made, expected, whole=data)


def damaged_archive(seed: int, number: int, size: int = PER_ARCHIVE) -> Item:
    """Make an archive of the images `number * size` and the following ones, whole or as damaged as they are."""
    rng = random.Random(f"{seed}/archive/{number}")
    kind = rng.choice(["tar", "tgz", "zip"])
    data, inside = _archive(seed, number, size, kind, rng)
    made, how = damaged(data, rng, lambda: _archive(seed, number + 1, 5, rng.choice(["tar", "tgz", "zip"]), rng)[0])
    return Item(kind, how, made, "ok", inside)


def _archive(seed: int, number: int, size: int, kind: str, rng: random.Random) -> tuple[bytes, int]:
    files = []
    for place in range(number * size, (number + 1) * size):
        item = damaged_image(seed, place)
        extension = rng.choice(IMAGES) if rng.random() < 0.2 else item.kind.split()[0]
        folder = "a" * 120 + "/" if rng.random() < 0.05 else ""  # a name that tars have a record of its own for
        files.append((f"{folder}{place:09d}.{extension}", item.data))
        files.append((f"{folder}{place:09d}.txt", b"A picture."))
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as zipped:
            for name, data in files:
                zipped.writestr(zipfile.ZipInfo(name), data, zipped.compression)
    else:
        format = rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
        with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    made = buffer.getvalue()
    return (gzip.compress(made, 1, mtime=0) if kind == "tgz" else made), size
