"""The part of benchmarks/damage.py that damages the scans of photographs, and compares what is accepted with the whole.

Decoders complete a JPEG's picture whatever its scan holds. What tells that it is damaged is what they say of it and the
bytes that are left; where both look right, because the scan found its place again, a jump of the colours at a MCU and
symbols that no encoder writes; a scan that has none of these is accepted.
"""

import io
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.photographs import photograph
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import BadImage, decode, prepare

PHOTOGRAPHS = 12
OPTIONS = ImageOptions(min_side=1, max_side=None)
OFF = 16  # levels of a colour by which a pixel is wrong
LENGTHS = (16, 64, 200, 512, 4096)
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("RGB", {"quality": 75}),
    ("RGB", {"quality": 90}),
    ("RGB", {"quality": 95, "subsampling": 0}),
    ("RGB", {"quality": 85, "progressive": True}),
    ("RGB", {"quality": 85, "optimize": True}),
    ("RGB", {"quality": 85, "restart_marker_rows": 1}),
    ("L", {"quality": 85}),
    ("CMYK", {"quality": 85}),
]


@cache
def whole_scan(seed: int, variant: int, kind: int) -> bytes:
    """Make a photograph as a JPEG of one of the kinds."""
    image = Image.open(io.BytesIO(photograph(random.Random(f"{seed}/photograph/{variant}")))).convert("RGB")
    image.thumbnail((640, 640), Image.Resampling.BICUBIC)
    mode, options = KINDS[kind]
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _insert(data: bytearray, at: int, length: int, rng: random.Random, other: bytes) -> None:
    data[at:at] = rng.randbytes(length)


def _repeat(data: bytearray, at: int, length: int, rng: random.Random, other: bytes) -> None:
    data[at:at] = data[at : min(at + length, len(data) - 2)]


def _drop(data: bytearray, at: int, length: int, rng: random.Random, other: bytes) -> None:
    del data[at : min(at + length, len(data) - 2)]


def _flip(data: bytearray, at: int, length: int, rng: random.Random, other: bytes) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _zero(data: bytearray, at: int, length: int, rng: random.Random, other: bytes) -> None:
    end = min(at + length, len(data) - 2)
    data[at:end] = bytes(end - at)


def _noise(data: bytearray, at: int, length: int, rng: random.Random, other: bytes) -> None:
    end = min(at + length, len(data) - 2)
    data[at:end] = rng.randbytes(end - at)


def _head(data: bytearray, at: int, length: int, rng: random.Random, other: bytes) -> None:
    data[at : min(at + length, len(data) - 2)] = other[:length]


def _cut(data: bytearray, at: int, length: int, rng: random.Random, other: bytes) -> None:
    del data[at:-2]


WAYS: dict[str, Callable[[bytearray, int, int, random.Random, bytes], None]] = {
    "insert": _insert,
    "repeat": _repeat,
    "drop": _drop,
    "flip": _flip,
    "zero": _zero,
    "noise": _noise,
    "head": _head,
    "cut": _cut,
}


def damaged_scan(seed: int, number: int) -> tuple[str, bytes, bytes]:
    """Damage one scan: return the kind of damage, the damaged file and the whole one."""
    rng = random.Random(f"{seed}/scan/{number}")
    whole = whole_scan(seed, rng.randrange(PHOTOGRAPHS), rng.randrange(len(KINDS)))
    other = whole_scan(seed, rng.randrange(PHOTOGRAPHS), rng.randrange(len(KINDS)))
    way = rng.choice(sorted(WAYS))
    begin = whole.rindex(b"\xff\xda", 0, len(whole) // 2) + 14
    data = bytearray(whole)
    WAYS[way](data, rng.randrange(begin, len(data) - 2), rng.choice(LENGTHS), rng, other)
    return way, bytes(data), whole


def padded_scan(seed: int, number: int) -> tuple[bytes, bytes]:
    """Make a whole file with a camera's stray bytes before its end, and the same file without them."""
    rng = random.Random(f"{seed}/padded/{number}")
    whole = whole_scan(seed, rng.randrange(PHOTOGRAPHS), rng.randrange(len(KINDS)))
    few = bytes(rng.randrange(255) for _ in range(rng.randrange(1, 5)))
    stray = rng.choice([few, bytes(rng.randrange(1, 5000)), b"\xff" * rng.randrange(1, 50)])
    return whole[:-2] + stray + whole[-2:], whole


def stored(data: bytes) -> np.ndarray:
    """Return the pixels that ingest stores, not reduced."""
    return decode(prepare(data, OPTIONS).data, OPTIONS.max_pixels).pixels


def wrong_share(found: np.ndarray, right: np.ndarray) -> float:
    """Return the share of pixels that are off by more than `OFF` levels; all of them if the sizes differ."""
    if found.shape != right.shape:
        return 1.0
    return float((np.abs(found.astype(int) - right).max(axis=2) > OFF).mean())


def measure_scans(count: int, seed: int) -> dict[str, Any]:
    """Damage so many scans, and pad a fifth as many."""
    outcomes: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for number in range(count):
        way, data, whole = damaged_scan(seed, number)
        try:
            found = stored(data)
        except BadImage as error:
            outcomes[error.reason] += 1
            continue
        outcomes["ok"] += 1
        if data != whole and wrong_share(found, stored(whole)) > 0.1:
            wrong[f"{way}, stray bytes forgiven" if _complained(data) else way] += 1
    refused = 0
    for number in range(-(-count // 5)):
        data, whole = padded_scan(seed, number)
        try:
            refused += wrong_share(stored(data), stored(whole)) > 0
        except BadImage:
            refused += 1
    return {
        "scans": count,
        "outcomes": dict(outcomes.most_common()),
        "accepted_wrong": wrong.total(),
        "accepted_wrong_share": round(wrong.total() / max(count, 1), 4),
        "forgiven_wrong": sum(found for way, found in wrong.items() if "forgiven" in way),
        "accepted_wrong_by_damage": dict(wrong.most_common()),
        "padded": -(-count // 5),
        "padded_refused": int(refused),
    }


def _complained(data: bytes) -> bool:
    """Check that the decoder had something to say of a file."""
    try:
        colours = simplejpeg.decode_jpeg_header(data)[2]
        simplejpeg.decode_jpeg(data, colorspace="CMYK" if colours in ("CMYK", "YCCK") else "RGB")
    except ValueError:
        return True
    return False
