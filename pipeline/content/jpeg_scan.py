"""Tell JPEGs whose scan is whole from those whose scan is damaged, which decoders complete without an error."""

import re
from typing import Any

import numpy as np
import simplejpeg

from microdit.pipeline.content.decoded import BadImage

FEW = 4  # stray bytes that some cameras write between a complete picture and its end
MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
STRAY = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


def decode_whole(data: bytes, **options: Any) -> np.ndarray:
    """Decode a JPEG by simplejpeg, with its options, if nothing is wrong with its scans.

    A scan that was damaged loses its place: the decoder is done with all blocks before the bytes are at an end, and
    says so as it says that a camera wrote stray bytes behind a complete picture. Such bytes are forgiven if they are
    few or all equal, and if the last byte before them ends as a scan does: what is left of it is filled with ones.

    Raises:
        ValueError: the JPEG is damaged; the message is libjpeg's.
    """
    try:
        return simplejpeg.decode_jpeg(data, **options)
    except ValueError as error:
        stray = STRAY.search(str(error))
        end = end_of_scans(data)
        if stray is None or end is None:
            raise
        begins = end - int(stray[1])
        padding = data[begins:end]
        if len(padding) > FEW and padding.count(padding[:1]) < len(padding):
            raise
        pixels = simplejpeg.decode_jpeg(data, strict=False, **options)
        if data[begins - 2 : begins] != b"\xff\0" and not _ends_in_ones(data, begins - 1, pixels, options):
            raise
        return pixels


def _ends_in_ones(data: bytes, at: int, pixels: np.ndarray, options: dict[str, Any]) -> bool:
    """Check that the bits of the byte `at` that the decoder has no use for, the last ones, are all set."""
    last = data[at]
    turned = last | (last + 1)  # the last zero set: without effect if it is among those bits
    if turned > 0xFE:
        return last == 0xFF or _is_used(data[:at] + b"\xff\0" + data[at + 1 :], pixels, options)
    return _is_used(data[:at] + bytes([turned]) + data[at + 1 :], pixels, options)


def _is_used(changed: bytes, pixels: np.ndarray, options: dict[str, Any]) -> bool:
    return not np.array_equal(simplejpeg.decode_jpeg(changed, strict=False, **options), pixels)


def end_of_scans(data: bytes) -> int | None:
    """Find the end marker of a JPEG; None if its scans go on to the end of the bytes."""
    at = 2
    while match := MARKER.search(data, at):
        name, at = match[1][0], match.end()
        if name == 0xD9:
            return match.end() - 2
        if not 0xD0 <= name <= 0xD8 and name != 0x01:
            at += int.from_bytes(data[at : at + 2], "big")
    return None


def check_markers(data: bytes) -> None:
    """Refuse a JPEG without an end, or with restart markers out of turn: for one that simplejpeg cannot decode.

    Raises:
        BadImage: `truncated` or `damaged`.
    """
    if (end := end_of_scans(data)) is None:
        raise BadImage("truncated", "the JPEG has no end marker")
    turn, begin = 0, data.find(b"\xff\xda")
    for match in re.finditer(rb"\xff([^\x00\xff])", data[begin + 2 : end], re.DOTALL):
        name = match[1][0]
        if 0xD0 <= name <= 0xD7:
            if name != 0xD0 + turn % 8:
                raise BadImage("damaged", f"restart marker {name - 0xD0} where {turn % 8} was expected")
            turn += 1
        elif name == 0xDA:
            turn = 0
        elif name == 0xD8:
            raise BadImage("damaged", "another JPEG begins inside the picture")
