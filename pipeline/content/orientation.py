"""Find which way up a picture is: by EXIF, without that by XMP, in all formats alike."""

import re
import struct

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
ORDERS = {b"II*\0": "<", b"MM\0*": ">"}  # of bytes in EXIF data, by how they begin
NUMBERS = {1: "B", 3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii"}  # by EXIF type; two are a fraction
XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|>)\s*([0-9]+)""")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(exif: bytes, xmp: bytes) -> int:
    """Return the orientation, 1 to 8: 1 (upright) if neither EXIF nor XMP says one that can be read."""
    found = _exif_orientation(exif)
    if found is None and (match := XMP_ORIENTATION.search(xmp)):
        found = float(match[1][:4])
    return int(found) if found is not None and found in range(1, 9) else 1


def readable(exif: bytes) -> bool:
    """Check that EXIF data, if there are any, begin as such: readers fail at others, and with them at the picture."""
    return not (exif := _without_name(exif)) or exif[:4] in ORDERS


def _without_name(exif: bytes) -> bytes:
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif


def _exif_orientation(exif: bytes) -> float | None:
    """Read the orientation in the first directory of EXIF data; None if there is none."""
    exif = _without_name(exif)
    order = ORDERS.get(exif[:4])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, _ = struct.unpack_from(order + "HHI", exif, entry)
            if tag != ORIENTATION or kind not in NUMBERS:
                continue
            form = order + NUMBERS[kind]
            (where,) = struct.unpack_from(order + "I", exif, entry + 8)
            values = struct.unpack_from(form, exif, where if struct.calcsize(form) > 4 else entry + 8)
            return values[0] / values[1] if len(values) == 2 and values[1] else float(values[0])
    except struct.error:  # the data ends too early
        pass
    return None


def upright_array(pixels: np.ndarray, turned: int) -> np.ndarray:
    """Undo an orientation of (H, W, 3)."""
    if turned >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if turned in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turned in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def upright(image: Image.Image, turned: int) -> Image.Image:
    """Undo an orientation of a Pillow image."""
    return image.transpose(TURNS[turned]) if turned in TURNS else image
