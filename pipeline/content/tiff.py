"""Recognise TIFF pictures, and which of their many kinds are decoded: 1, 8 and 16 bits, gray or of colours."""

from PIL import Image

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class UnsupportedTiffError(ValueError):
    """A kind of TIFF that is no picture for the eye; the message says which."""


def is_tiff(data: bytes) -> bool:
    """Tell a TIFF by its first bytes."""
    return data.startswith(STARTS)


def check_tiff(image: Image.Image) -> None:
    """Refuse what has no known range of values: 32 bits, floating point.

    Raises:
        UnsupportedTiffError: it is of such a kind.
    """
    if image.mode in ("I", "F"):
        kind = "floating point" if image.mode == "F" else "32 bits"
        raise UnsupportedTiffError(f"a TIFF of {kind}; expected 8 or 16 bits")
