"""Decode WebP, AVIF, GIF, BMP and the first page of a TIFF by Pillow."""

import io
import re

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from microdit.pipeline.content.colour import flattened
from microdit.pipeline.content.decoded import BadImage, Decoded, Limits
from microdit.pipeline.content.orientation import orientation, readable, upright
from microdit.pipeline.content.tiff import check_tiff

FORMATS = ("WEBP", "AVIF", "GIF", "BMP", "TIFF")
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and its value
AVIF_EXIF = re.compile(rb"(infe\x02.{7})Exif", re.DOTALL)  # the entry of EXIF data in an AVIF's list of items


def decode_other(data: bytes, limits: Limits) -> Decoded:
    """Decode a picture of one of these formats.

    Raises:
        BadImage: with the reason `bomb` or `animated`; Pillow raises others.
    """
    with _opened(data) as image:
        limits.check(image.width, image.height)
        if image.format == "TIFF":  # of several pages the first; to count them would read the whole file
            check_tiff(image)
        elif getattr(image, "is_animated", False):
            raise BadImage("animated", f"{image.format} with several frames; expected one picture")
        limits.admit(image.width * image.height)
        frame = image.tile[0].extents if image.format == "GIF" and image.tile else None
        image.load()
        name = str(image.format).lower()
        exif: bytes = image.info.get("exif") or b""
        plain = image.mode in ("RGB", "L") and "transparency" not in image.info and readable(exif)
        turned = orientation(exif, image.info.get("xmp") or b"")
        picture: Image.Image = image
        if name == "bmp" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
            picture = image.convert("RGB")  # a writer that left the fourth byte at zero
        elif frame is not None and frame != (0, 0, *image.size):
            picture = Image.new("RGBA", image.size)
            picture.paste(image.crop(frame).convert("RGBA"), frame)
        elif name == "tiff" and _is_inverted(image):
            picture = Image.fromarray(65535 - np.asarray(image))  # Pillow inverts 8 bits alone
        flat, note = flattened(picture, image.info.get("icc_profile"))
        flat = upright(flat, turned)
        return Decoded(flat, *flat.size, name, plain and turned == 1 and not note, profile=note)


def _is_inverted(image: Image.Image) -> bool:
    """Check for a TIFF of 16 bits in which zero is white."""
    tags = getattr(image, "tag_v2", {})
    return image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def _opened(data: bytes) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (UnidentifiedImageError, ValueError):  # by an AVIF's EXIF data, which are read first and may be broken
        without = AVIF_EXIF.sub(rb"\1none", data, count=1) if data[4:8] == b"ftyp" else data
        if without == data:
            raise
        return Image.open(io.BytesIO(without), formats=["AVIF"])
