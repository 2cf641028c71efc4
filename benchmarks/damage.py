"""Damaged images and archives through ingest's decoder: each is taken or has a reason; none crashes it or hangs it.

    python benchmarks/damage.py [--count 10000] [--seed N] [--json]

Pictures of every format and kind that is taken (and animations, which are not) are drawn, encoded and damaged: bits
turned over, cut off, spliced, runs of zeros or noise, headers that lie; some are left whole. Each goes through
`pipeline.images.prepare`, and what comes of it is decoded again. Of every 50 one archive is made (tar, tgz, zip; some
members with another extension than their own), which is damaged likewise and read by `pipeline.sources.archives`.
All of it in a child process: when that dies or takes more than the bound for one item, a crash or a hang is counted,
and the next item gets another process. An item is made of the seed and its number: `damaged_image(seed, number)`.
"""

import argparse
import gzip
import io
import json
import random
import resource
import struct
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import ImageOptions
from pipeline.images import BadImage, decode, prepare
from pipeline.sources.archives import members
from pipeline.sources.files import MAX_BYTES
from pipeline.sources.grouped import IMAGES, is_image
from pipeline.stages.careful import Careful

OPTIONS = ImageOptions(min_side=32, max_side=96)  # small, so that every way through `prepare` is taken
PER_ARCHIVE = 50
VARIANTS = 6  # pictures of each kind
BOUND = 30.0  # seconds for one item
IMAGE_REASONS = {"not_an_image", "truncated", "damaged", "bomb", "too_small", "too_long", "animated"}
MEMBER_REASONS = {"too_large", "not_a_file", "encrypted", "unsupported", "damaged_member", "bomb", "damaged_archive"}
NUMBERS = (0, 1, 2, 7, 255, 256, 4095, 10_000, 16_384, 32_768, 65_500, 65_535)
LARGE = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


# -- whole pictures --------------------------------------------------------------------------------------------------


def drawn(rng: random.Random) -> Image.Image:
    """An RGB picture: a colour run, noise of some grain, and a rectangle."""
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
    """An image as a tool writes it, and what must come of it: `ok`, `too_small` or `animated`."""
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
    """A piece is there several times."""
    start = rng.randrange(len(data))
    piece = bytes(data[start : start + rng.choice([2, 50, 1000])])
    data[start:start] = piece * rng.choice([1, 5, 60])


def lie(data: bytearray, rng: random.Random) -> None:
    """A length, a size or a type in a header says something else, with the right checksum where there is one."""
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
    """The data damaged in one way, sometimes two, and how; `whole` if it was left alone."""
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
    """What must come of it if it is whole."""
    inside: int = 0
    """Of an archive: the members that are asked for."""


def damaged_image(seed: int, number: int) -> Item:
    rng = random.Random(f"{seed}/image/{number}")

    def whole() -> tuple[str, tuple[bytes, str]]:
        kind = rng.choice(sorted(KINDS))
        return kind, whole_image(seed, kind, rng.randrange(VARIANTS))

    kind, (data, expected) = whole()
    made, how = damaged(data, rng, lambda: whole()[1][0])
    return Item(kind, how, made, expected)


def damaged_archive(seed: int, number: int, size: int = PER_ARCHIVE) -> Item:
    """An archive of the images `number * size` and the following ones, whole or as damaged as they are."""
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


# -- in the child ----------------------------------------------------------------------------------------------------


def examine_image(data: bytes) -> dict[str, Any]:
    """What comes of an image: `outcome` is `ok`, a reason, or `escaped` if something else than a reason comes."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    outcome, detail = _prepared(data)
    return {"outcome": outcome, "detail": detail, "seconds": time.perf_counter() - began, "memory": _memory()}


def examine_archive(data: bytes) -> dict[str, Any]:
    """The same for an archive, with the outcomes of its members."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    found: Counter[str] = Counter()
    outcome, detail = "ok", ""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "archive")).write_bytes(data)
        try:
            for member in members(path, is_image, MAX_BYTES):
                if outcome != "ok":
                    raise AssertionError("a member behind the one that tells that the archive ends")
                if member.reason == "damaged_archive":
                    outcome, detail = member.reason, member.detail
                elif member.reason is not None:
                    known = member.reason in MEMBER_REASONS and member.data is None
                    found[member.reason if known else "escaped"] += 1
                else:
                    found[_prepared(member.data or b"")[0]] += 1
        except Exception as error:  # that is what is looked for
            outcome, detail = "escaped", f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - began
    return {"outcome": outcome, "detail": detail, "seconds": seconds, "members": dict(found), "memory": _memory()}


def _prepared(data: bytes) -> tuple[str, str]:
    try:
        made = prepare(data, OPTIONS)
    except BadImage as error:
        fine = error.reason in IMAGE_REASONS and str(error)
        return (error.reason, str(error)) if fine else ("escaped", f"reason {error.reason!r}: {error}")
    except Exception as error:  # that is what is looked for
        return "escaped", f"{type(error).__name__}: {error}"
    try:
        kept = decode(made.data, OPTIONS.max_pixels)
    except BadImage as error:
        return "escaped", f"what is stored cannot be decoded: {error.reason}: {error}"
    if kept.format != "jpeg" or (kept.width, kept.height) != (made.width, made.height):
        return "escaped", f"what is stored is a {kept.format} of {kept.width}x{kept.height}, not as it says"
    return "ok", ""


def _memory() -> int:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# -- the whole run ---------------------------------------------------------------------------------------------------


@dataclass
class Totals:
    """What came of one sort of item."""

    outcomes: Counter[str] = field(default_factory=Counter)
    by_kind: dict[str, Counter[str]] = field(default_factory=dict)
    by_damage: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: float = 0.0
    slowest: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0})
    memory: int = 0

    def add(self, item: Item, number: int, found: dict[str, Any]) -> None:
        outcome = found["outcome"]
        self.outcomes[outcome] += 1
        self.by_kind.setdefault(item.kind, Counter())[outcome] += 1
        for damage in set(item.damage.split("+")):
            self.by_damage.setdefault(damage, Counter())[outcome] += 1
        self.seconds += found["seconds"]
        self.memory = max(self.memory, found["memory"])
        if found["seconds"] > self.slowest["seconds"]:
            about = {"item": number, "kind": item.kind, "damage": item.damage, "outcome": outcome}
            self.slowest = {"seconds": round(found["seconds"], 3), **about}


def measure(count: int, seed: int, bound: float = BOUND) -> dict[str, Any]:
    began = time.perf_counter()
    images, archives, inside = Totals(), Totals(), Counter[str]()
    bad: list[dict[str, Any]] = []
    with Careful(examine_image, bound) as image_child, Careful(examine_archive, bound) as archive_child:
        for number in range(count):
            item = damaged_image(seed, number)
            found = _examined(image_child, item, bound)
            images.add(item, number, found)
            if found["outcome"] in ("crash", "stall", "escaped") or (
                item.damage == "whole" and found["outcome"] != item.expected
            ):
                bad.append({"image": number, "kind": item.kind, "damage": item.damage, **found})
        for number in range(-(-count // PER_ARCHIVE)):
            size = min(PER_ARCHIVE, count)
            item = damaged_archive(seed, number, size)
            found = _examined(archive_child, item, bound)
            archives.add(item, number, found)
            held = found.get("members", {})
            inside.update(held)
            short = item.damage == "whole" and (found["outcome"], sum(held.values())) != ("ok", item.inside)
            if found["outcome"] in ("crash", "stall", "escaped") or held.get("escaped") or short:
                bad.append({"archive": number, "kind": item.kind, "damage": item.damage, **found})
    totals = (images, archives)
    return {
        "seed": seed,
        "images": count,
        "archives": archives.outcomes.total(),
        "members": inside.total(),
        "crashes": sum(total.outcomes["crash"] for total in totals),
        "hangs": sum(total.outcomes["stall"] for total in totals),
        "escaped": sum(total.outcomes["escaped"] for total in totals) + inside["escaped"],
        "bad": len(bad),
        "adds_up": images.outcomes.total() == count
        and all(sum(kind.total() for kind in t.by_kind.values()) == t.outcomes.total() for t in totals),
        "slowest_image": images.slowest,
        "slowest_archive": archives.slowest,
        "images_per_second": round(count / images.seconds, 1) if images.seconds else 0.0,
        "peak_memory_mb": max(images.memory, archives.memory),
        "seconds": round(time.perf_counter() - began, 1),
        "image_outcomes": dict(images.outcomes.most_common()),
        "archive_outcomes": dict(archives.outcomes.most_common()),
        "member_outcomes": dict(inside.most_common()),
        "by_kind": {kind: dict(found) for kind, found in sorted((images.by_kind | archives.by_kind).items())},
        "by_damage": {way: dict(found) for way, found in sorted(images.by_damage.items())},
        "bad_items": bad[:20],
    }


def _examined(child: Careful[dict[str, Any]], item: Item, bound: float) -> dict[str, Any]:
    try:
        return child(item.data)
    except BadImage as error:
        return {
            "outcome": error.reason,
            "detail": str(error),
            "seconds": bound if error.reason == "stall" else 0.0,
            "memory": 0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="images; an archive more for every 50")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time; it is printed")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    found = measure(options.count, seed)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            if isinstance(value, dict):
                print(name)
                for key, number in value.items():
                    print(f"  {key:20} {number}")
            elif isinstance(value, list):
                for line in value:
                    print(f"{name}: {line}")
            else:
                print(f"{name:22} {value}")
    if found["bad"] or not found["adds_up"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
