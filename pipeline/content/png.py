"""Decode PNGs: the chunks that make the picture go to Pillow, what else a file holds can do the picture no harm."""

import io
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from microdit.pipeline.content.colour import MAX_PROFILE, flattened
from microdit.pipeline.content.decoded import BadImage, Decoded, Limits
from microdit.pipeline.content.orientation import orientation, readable, upright

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NEEDED = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
LEAST = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}  # bytes of a chunk
MAX_TEXT = 1 << 20  # bytes of a text, unpacked; readers refuse a PNG with more
MAX_TEXTS = 16 << 20  # of all texts together
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


@dataclass
class Chunks:
    """Contents of a PNG's chunks."""

    picture: bytes = b""
    """The file with nothing but the chunks that make the picture."""
    profile: bytes | None = None
    exif: bytes = b""
    xmp: bytes = b""
    wrong: set[bytes] = field(default_factory=set)
    """The names of chunks that are damaged, or more than readers take."""
    room: int = MAX_TEXTS


def decode_png(data: bytes, limits: Limits) -> Decoded:
    """Decode a PNG.

    Raises:
        BadImage: with the reason `bomb`, `truncated`, `damaged` or `animated`; Pillow raises others.
    """
    chunks = _read_chunks(data)
    with Image.open(io.BytesIO(chunks.picture), formats=["PNG"]) as image:
        limits.check(image.width, image.height)
        if getattr(image, "is_animated", False):
            raise BadImage("animated", "PNG with several frames; expected one picture")
        limits.admit(image.width * image.height)
        if b"IDAT" in chunks.wrong:
            _check_stream(data)
        image.load()
        if _may_lack_rows(image):
            _check_rows(data)
        _scale_transparency(image, data)
        plain = image.mode in ("RGB", "L") and "transparency" not in image.info
        plain = plain and not chunks.wrong and readable(chunks.exif)
        turned = orientation(chunks.exif, chunks.xmp)
        flat, note = flattened(image, chunks.profile)
        flat = upright(flat, turned)
        return Decoded(flat, *flat.size, "png", plain and turned == 1 and not note, profile=note)


def _read_chunks(data: bytes) -> Chunks:
    """Split a PNG into the picture and what is said about it; what is damaged of the latter is left out."""
    chunks, kept, at = Chunks(), [data[:8]], 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):  # cut off: Pillow says what is missing
            if name in NEEDED:
                kept.append(data[at:])
            chunks.wrong.add(name)
            break
        sound = zlib.crc32(memoryview(data)[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if not sound:
            chunks.wrong.add(name)
        if name in NEEDED:
            kept.append(data[at:end])
        elif sound:
            _note(chunks, name, data[at + 8 : end - 4])
        at = end
        if name == b"IEND":
            break
    chunks.picture = b"".join(kept)
    return chunks


def _note(chunks: Chunks, name: bytes, body: bytes) -> None:
    """Take a profile, EXIF data or XMP from a chunk, and check what others hold."""
    key, _, rest = body.partition(b"\0")
    if name == b"eXIf":
        chunks.exif = body
    elif name == b"iCCP":
        chunks.profile = _unpacked(chunks, name, rest, MAX_PROFILE) or b"?"  # one that cannot be read counts as broken
    elif name in (b"tEXt", b"zTXt"):
        text = _unpacked(chunks, name, rest, MAX_TEXT) if name == b"zTXt" else rest
        if key in (b"Raw profile type exif", b"Raw profile type APP1") and not chunks.exif:
            digits = b"".join(text[: 2 * MAX_TEXT].split()[2:])  # behind the name and the length
            chunks.exif = bytes.fromhex(digits.decode()) if _is_hex(digits) else b"?"
    elif name == b"iTXt":
        text = rest[2:].split(b"\0", 2)[-1]
        text = _unpacked(chunks, name, rest[1:2] + text, MAX_TEXT) if rest[:1] == b"\1" else text
        if key == b"XML:com.adobe.xmp":
            chunks.xmp = text
    elif len(body) < LEAST.get(name, 0):
        chunks.wrong.add(name)


def _is_hex(digits: bytes) -> bool:
    return len(digits) % 2 == 0 and not digits.strip(b"0123456789abcdefABCDEF")


def _unpacked(chunks: Chunks, name: bytes, packed: bytes, most: int) -> bytes:
    """Unpack what a chunk holds behind its name; nothing comes of one that is damaged or too long."""
    inner, unpacked = zlib.decompressobj(), b""
    with suppress(zlib.error):
        unpacked = inner.decompress(packed[1:], min(most, max(chunks.room, 1)))
    chunks.room -= len(unpacked)
    if packed[:1] == b"\0" and inner.eof:
        return unpacked
    chunks.wrong.add(name)
    return b""


def _scale_transparency(image: Image.Image, data: bytes) -> None:
    """Scale the transparent colour as Pillow does the pixels, which it brings from any depth to 8 bits."""
    colour: Any = image.info.get("transparency")
    depth = data[24]
    if colour is None or image.mode not in ("L", "RGB"):
        return
    values = colour if isinstance(colour, tuple) else (colour,)
    if depth == 16:
        values = tuple(value >> 8 for value in values)
    else:
        most = (1 << depth) - 1
        values = tuple((value & most) * 255 // most for value in values)
    image.info["transparency"] = values if isinstance(colour, tuple) else values[0]


def _may_lack_rows(image: Image.Image) -> bool:
    """Check for a last pixel of zeros, as of missing rows, or an interlaced PNG, whose rows come in another order."""
    last: Any = image.getpixel((image.width - 1, image.height - 1))
    return bool(image.info.get("interlace")) or not any(last if isinstance(last, tuple) else (last,))


def _check_rows(data: bytes) -> None:
    """Refuse a PNG with fewer rows than its header says, which Pillow leaves black without an error."""
    width, height, depth, colours, _, _, interlaced = struct.unpack_from(">2I5B", data, 16)
    bits = depth * {2: 3, 4: 2, 6: 4}.get(colours, 1)
    if interlaced:  # x and y of the first pixel of each pass, and the steps from there
        sizes = [(-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in PASSES]
    else:
        sizes = [(width, height)]
    missing = sum(down * (1 + -(-across * bits // 8)) for across, down in sizes if across > 0 and down > 0)
    inner, at = zlib.decompressobj(), 8
    while missing > 0 and not inner.eof and at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        packed = data[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        while packed and missing > 0:
            missing -= len(inner.decompress(packed, 1 << 20))
            packed = inner.unconsumed_tail
        at += 12 + length
    if missing > 0:
        raise BadImage("truncated", f"{width}x{height}, but {missing} bytes of that are missing")


def _check_stream(data: bytes) -> None:
    """Refuse a PNG whose pixels have a wrong checksum inside too: where the chunk's alone is wrong they are right."""
    inner, at = zlib.decompressobj(), 8
    try:
        while not inner.eof and at + 8 <= len(data):
            length, name = struct.unpack_from(">I4s", data, at)
            packed = data[at + 8 : at + 8 + length] if name == b"IDAT" else b""
            while packed and not inner.eof:
                inner.decompress(packed, 1 << 20)
                packed = inner.unconsumed_tail
            at += 12 + length
    except zlib.error as error:
        raise BadImage("damaged", f"the pixels do not agree with their checksums: {error}") from None
