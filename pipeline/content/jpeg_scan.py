"""Tell JPEGs whose scan is whole from those whose scan is damaged, which decoders complete without an error."""

import re
from typing import Any

import numpy as np
import simplejpeg

from microdit.pipeline.content.decoded import BadImage

FEW = 4  # stray bytes that some cameras write between a complete picture and its end
READ_AHEAD = 16  # bytes, and more than libjpeg reads before it needs them; those it does not count as stray
ZEROS = bytes(32)
END = b"\xff\xd9"
MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
STRAY = re.compile(r"(\d+) extraneous bytes before marker 0xd9")


def decode_whole(data: bytes, **options: Any) -> np.ndarray:
    """Decode a JPEG by simplejpeg, with its options, if nothing is wrong with its scans.

    A scan that was damaged loses synchronisation: the decoder is done with all blocks before the bytes are at an end,
    and says so as it says that a camera wrote stray bytes behind a complete picture. Such bytes are forgiven if they
    are few or all equal, and if the last byte before them ends as a scan does: what is left of it is filled with ones.

    Raises:
        ValueError: the JPEG is damaged; the message is libjpeg's.
    """
    _check_zeros(data)
    try:
        return simplejpeg.decode_jpeg(data, **options)
    except ValueError as error:
        stray = STRAY.search(str(error))
        end, begins = end_of_scans(data)
        if stray is None or end is None or not begins:
            raise
        counted = int(stray[1])
        if counted > FEW and not _equal(data[end - counted : end]):
            raise
        last = _last_byte(data, begins[-1], end - counted, options)
        if end - last - 1 > FEW and not _equal(data[last + 1 : end]):
            raise
        pixels = simplejpeg.decode_jpeg(data[: last + 1] + END, **options)
        # the last bits of many scans hardly show
        if len(begins) == 1 and not _ends_in_ones(data, last, pixels, options):
            raise
        return pixels


def _check_zeros(data: bytes) -> None:
    """Refuse a scan with a run of zeros that no encoder writes, as of a block of a file that never came."""
    if ZEROS not in data:
        return
    end, begins = end_of_scans(data)
    if end is None or len(begins) != 1:  # scans of one component or one sort of coefficients may have such runs
        return
    at = data.find(ZEROS, begins[0], end)
    if at >= 0 and data[at:end].strip(b"\0") and not _zeros_end_blocks(data[: begins[0]]):
        raise ValueError(f"a run of zeros in the scan, {at - begins[0]} bytes from its beginning")


def _zeros_end_blocks(header: bytes) -> bool:
    """Check that zeros are the code for "nothing more in this block" in all tables: then a flat picture is many zeros.

    Where they are a coefficient's code, a run of them is all coefficients of a block, of one value.
    """
    at = 2
    while match := MARKER.match(header, at):
        at, end = match.end() + 2, match.end() + int.from_bytes(header[match.end() : match.end() + 2], "big")
        while match[1] == b"\xc4" and at + 17 < end:  # a table: its kind, how many codes have each length, the symbols
            if header[at] >= 0x10 and header[at + 17] != 0:
                return False
            at += 17 + sum(header[at + 1 : at + 17])
        at = end
    return True


def _equal(padding: bytes) -> bool:
    return padding.count(padding[:1]) == len(padding)


def _last_byte(data: bytes, begin: int, last: int, options: dict[str, Any]) -> int:
    """Find the last byte of the scan from `begin` that the decoder needs, at most `READ_AHEAD` before `last`."""
    least = max(begin, last - READ_AHEAD)
    while least < last:
        middle = (least + last) // 2
        try:
            simplejpeg.decode_jpeg(data[: middle + 1] + END, **options)
        except ValueError as error:
            if not STRAY.search(str(error)):  # too few
                least = middle + 1
                continue
        last = middle
    return last


def _ends_in_ones(data: bytes, at: int, pixels: np.ndarray, options: dict[str, Any]) -> bool:
    """Check that the bits of the byte `at` that the decoder has no use for, the last ones, are all set."""
    last = data[at]
    if last == 0xFF or data[at - 1 : at + 1] == b"\xff\0":
        return True
    turned = last | (last + 1)  # the last zero set: without effect if it is among those bits
    changed = data[:at] + (b"\xff\0" if turned == 0xFF else bytes([turned])) + END
    try:
        return not np.array_equal(simplejpeg.decode_jpeg(changed, **options), pixels)
    except ValueError:  # it has an effect
        return True


def end_of_scans(data: bytes) -> tuple[int | None, list[int]]:
    """Find the end marker of a JPEG, None if its scans go on to the end of the bytes, and where the scans begin."""
    at, begins = 2, list[int]()
    while match := MARKER.search(data, at):
        name, at = match[1][0], match.end()
        if name == 0xD9:
            return match.start(), begins
        if not 0xD0 <= name <= 0xD8 and name != 0x01:
            at += int.from_bytes(data[at : at + 2], "big")
        if name == 0xDA:
            begins.append(at)
    return None, begins


def check_markers(data: bytes) -> None:
    """Refuse a JPEG without an end, or with restart markers out of turn: for one that simplejpeg cannot decode.

    Raises:
        BadImage: `truncated` or `damaged`.
    """
    if (end := end_of_scans(data)[0]) is None:
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
