"""Decode JPEGs: by simplejpeg, at a fraction of their size where that is enough; by Pillow what that does not take."""

import io
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from microdit.pipeline.content.colour import flattened
from microdit.pipeline.content.decoded import BadImage, Decoded, Limits
from microdit.pipeline.content.jpeg_entropy import check_place
from microdit.pipeline.content.jpeg_scan import check_markers, decode_whole
from microdit.pipeline.content.orientation import orientation, readable, upright, upright_array

MAX_SCANS = 200  # of a progressive JPEG, which has about ten; each costs a pass over the whole picture
SHRINK_MARGIN = 1.25  # a JPEG is decoded at least this much larger than the size that it is resized to
PROFILE = b"ICC_PROFILE\0"
ADOBE = re.compile(rb"(\xff\xee\x00\x0eAdobe.{6})[^\x00\x01]", re.DOTALL)  # the last byte: how colours are coded
KNOWN = b"\\1\x01"  # YCbCr, as decoders take them all
XMP = b"http://ns.adobe.com/xap/1.0/\0"


@dataclass
class Segments:
    """Contents of the segments before a JPEG's picture."""

    exif: bytes
    xmp: bytes
    profile: bytes | None
    progressive: bool
    one_scan: bool
    """Decoders read one scan of the picture and no more."""
    head: bytes
    """The segments but for EXIF data, profiles and other notes."""
    begin: int
    """Offset in bytes of the scan, behind the last segment."""


def decode_jpeg(data: bytes, limits: Limits, shrink_to: int | None, thorough: bool) -> Decoded:
    """Decode a JPEG.

    Args:
        shrink_to: it may be decoded at a fraction of its size, as long as the short side stays this many pixels and a
            quarter more.
        thorough: look too for a scan that lost synchronisation and resynchronised, at which decoders do not complain.

    Raises:
        BadImage: with the reason `bomb`, `truncated` or `damaged`; decoders raise others.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (KeyError, ValueError) as error:
        if "Adobe color transform" in str(error) and (known := ADOBE.sub(KNOWN, data, count=1)) != data:
            return replace(decode_jpeg(known, limits, shrink_to, thorough), plain=False)
        if "subsampling" not in str(error) and not isinstance(error, KeyError):
            raise
        return _decode_pillow(data, limits, thorough)
    limits.check(width, height)
    segments = read_segments(data)
    _check_scans(data, segments)
    if colours not in ("YCbCr", "RGB", "Gray"):
        return _decode_pillow(data, limits, thorough)
    turned = orientation(segments.exif, segments.xmp)
    least: dict[str, Any] = {}
    if shrink_to is not None and min(width, height) >= 2 * shrink_to * SHRINK_MARGIN and turned == 1:
        least = {"min_" + side: int(shrink_to * SHRINK_MARGIN) for side in ("width", "height")} | {"min_factor": 2}
    limits.admit(width * height // (4 if least and not segments.progressive else 1))
    pixels = decode_whole(data, **least)
    scale = 1.0 if not least else round(8 * pixels.shape[0] / height) / 8
    if thorough and not segments.progressive:
        check_place(data, pixels, scale)
    pixels = upright_array(pixels, turned)
    if turned >= 5:
        width, height = height, width
    source, note = _in_srgb(pixels, colours, segments.profile)
    plain = turned == 1 and not note and readable(segments.exif)
    return Decoded(source, width, height, "jpeg", plain, scale, note)


def _in_srgb(pixels: np.ndarray, colours: str, profile: bytes | None) -> tuple[np.ndarray | Image.Image, str]:
    if profile is None:
        return pixels, ""
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if colours == "Gray" else pixels)
    converted, note = flattened(image, profile)
    return (converted if note == "converted" else pixels), note


def _decode_pillow(data: bytes, limits: Limits, thorough: bool) -> Decoded:
    """Decode CMYK, and sampling that simplejpeg has no name for."""
    segments = read_segments(data)
    with Image.open(io.BytesIO(segments.head + data[segments.begin :]), formats=["JPEG"]) as image:
        limits.check(image.width, image.height)
        _check_scans(data, segments)
        limits.admit(image.width * image.height)
        try:
            whole = decode_whole(data, **({"colorspace": "CMYK"} if image.mode == "CMYK" else {}))
            if thorough:
                check_place(data, whole, 1.0)
        except ValueError as error:
            if "subsampling" not in str(error):
                raise
            check_markers(data)
        image.load()
        flat, note = flattened(image, segments.profile)
        flat = upright(flat, orientation(segments.exif, segments.xmp))
        return Decoded(flat, *flat.size, "jpeg", plain=False, profile=note)


def _check_scans(data: bytes, segments: Segments) -> None:
    if not segments.one_scan and (scans := count_scans(data)) > MAX_SCANS:
        raise BadImage("bomb", f"a JPEG of {scans} scans; at most {MAX_SCANS} are decoded")


def count_scans(data: bytes) -> int:
    """Count the markers of scans, FF DA. `bytes.count` would take a tenth of the decoding's time."""
    pairs = (np.frombuffer(data, "<u2", (len(data) - first) // 2, first) for first in (0, 1) if len(data) > first + 1)
    return sum(int(np.count_nonzero(pair == 0xDAFF)) for pair in pairs)


def read_segments(data: bytes) -> Segments:
    """Read the segments before a JPEG's picture."""
    exif: list[bytes] = []
    xmp = b""
    profile: list[tuple[int, bytes]] = []
    frames, kept, at = list[tuple[int, int]](), [data[:2]], 2  # of each frame its kind, and how many colours it has
    while data.startswith(b"\xff", at) and at + 4 <= len(data) and data[at + 1] != 0xDA:  # the picture begins there
        name = data[at + 1]
        if name == 0xFF:  # filling
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if name == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
            exif.append(data[at + 10 : end])
        elif name == 0xE1 and data.startswith(XMP, at + 4):
            xmp = xmp or data[at + 4 + len(XMP) : end]
        elif name == 0xE2 and data.startswith(PROFILE, at + 4) and end >= at + 18:
            profile.append((data[at + 16], data[at + 18 : end]))
        elif name in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) and end > at + 9:
            frames.append((name, data[at + 9]))
        if not 0xE1 <= name <= 0xED and name != 0xEF and name != 0xFE:  # JFIF and Adobe's segment tell the colours
            kept.append(data[at:end])
        at = end
    in_scan = int.from_bytes(data[at + 4 : at + 5], "big") if data.startswith(b"\xff\xda", at) else 0
    one_scan = in_scan > 0 and frames in ([(0xC0, in_scan)], [(0xC1, in_scan)])
    progressive = any(kind == 0xC2 for kind, _ in frames)
    joined = b"".join(part for _, part in sorted(profile)) if profile else None
    return Segments(b"".join(exif), xmp, joined, progressive, one_scan, b"".join(kept), at)
