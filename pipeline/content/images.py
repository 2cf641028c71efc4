"""Decode untrusted bytes to pixels, and encode pixels for storage. Everything is bounded before it is decoded.

Accepted are JPEG, PNG, WebP, AVIF, GIF and BMP with one picture in them, and the first page of a TIFF. Orientation
(EXIF, else XMP) is undone, colour profiles are converted to sRGB, palettes are resolved, transparency is laid on
white, CMYK, gray and 16-bit become 8-bit RGB. Metadata that is damaged is no fault of the picture. Animations are
refused: their captions describe no single frame.
"""

import io
import struct
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.decoded import BadImage, Decoded, Limits
from microdit.pipeline.content.jpeg import decode_jpeg
from microdit.pipeline.content.other_formats import decode_other
from microdit.pipeline.content.png import SIGNATURE, decode_png
from microdit.pipeline.content.tiff import UnsupportedTiffError, is_tiff

MEMBER_FORMATS = {"jpg": "jpeg", "png": "png", "webp": "webp"}
STORED_MARGIN = 2  # what is stored is reduced from so much more: fine text has 40 dB then, and 29 to 35 without
LONGEST = {"jpg": 65_500, "png": 2**31 - 1, "webp": 16_383}  # pixels of a side that each format can hold


@dataclass(frozen=True)
class Prepared:
    """An image as ingest stores it. Sizes are those of the upright picture."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    format: str
    """Of the bytes that came: `jpeg`, `png`, `webp`, `avif`, `gif`, `bmp` or `tiff`."""
    profile: str = ""
    """What became of a colour profile, as `Decoded.profile` has it."""


def prepare(data: bytes, options: ImageOptions) -> Prepared:
    """Decode an image whole and encode it for storage; bytes that need no change are kept as they came.

    JPEGs are examined more closely than by `decode`, which reads what is stored.

    Raises:
        BadImage: as `decode` does, and with `too_small` or `too_long`.
    """
    with ExitStack() as stack:
        margin = STORED_MARGIN if options.reduce == "sharp" else 1
        shrink_to = None if options.max_side is None else margin * options.max_side
        image = _decode(data, Limits(options.max_pixels, stack), shrink_to, thorough=True)
        short = min(image.width, image.height)
        if short < options.min_side:
            text = f"{image.width}x{image.height}; the short side must have {options.min_side} pixels"
            raise BadImage("too_small", text)
        if options.max_side is not None and short > options.max_side:
            pixels = image.resized(short_side_size(image.width, image.height, options.max_side))
        elif image.plain and image.format == MEMBER_FORMATS[options.format]:
            return Prepared(data, image.width, image.height, image.width, image.height, image.format)
        else:
            pixels = image.pixels
        height, width = pixels.shape[:2]
        if max(width, height) > (longest := LONGEST[options.format]):
            raise BadImage("too_long", f"{width}x{height}; a side of a {options.format} has {longest} pixels at most")
        made = encode(pixels, options)
        return Prepared(made, width, height, image.width, image.height, image.format, image.profile)


def decode(data: bytes, max_pixels: int, shrink_to: int | None = None) -> Decoded:
    """Decode an image whole.

    Args:
        max_pixels: width times height, known from the header, above which nothing is decoded.
        shrink_to: JPEGs may be decoded at a fraction of their size, as long as the short side stays this many pixels
            and a quarter more: for a resize to `shrink_to`.

    Raises:
        BadImage: with the reason `not_an_image`, `bomb`, `truncated`, `damaged` or `animated`.
    """
    with ExitStack() as stack:
        return _decode(data, Limits(max_pixels, stack), shrink_to, thorough=False)


def _decode(data: bytes, limits: Limits, shrink_to: int | None, thorough: bool) -> Decoded:
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return decode_jpeg(data, limits, shrink_to, thorough)
        return decode_png(data, limits) if data.startswith(SIGNATURE) else decode_other(data, limits)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage("bomb", str(error)) from None
    except UnsupportedTiffError as error:
        raise BadImage("unsupported", str(error)) from None
    except UnidentifiedImageError:
        reason = _fault(data) if _known(data) else "not_an_image"
        raise BadImage(reason, f"no picture that can be read; it begins with {data[:24]!r}") from None
    except Exception as error:  # decoders raise anything at all on damaged bytes; nothing but this image is at fault
        text = f"{type(error).__name__}: {error}"
        cut = isinstance(error, EOFError | struct.error) or any(w in text.lower() for w in ("truncat", "premature end"))
        raise BadImage("truncated" if cut else _fault(data), text) from None


def short_side_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Scale width and height to a short side of `side` pixels; the long side is rounded down."""
    return (side, side * height // width) if width <= height else (side * width // height, side)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) uint8 to `size` (width, height): bicubic, antialiased."""
    if size == (pixels.shape[1], pixels.shape[0]):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def decode_within(data: bytes, max_pixels: int, side: int) -> np.ndarray:
    """Decode to (H, W, 3) uint8, a longer long side reduced to `side` pixels: bicubic, antialiased.

    Raises:
        BadImage: as `decode`.
    """
    image = decode(data, max_pixels, side)
    longest = max(image.width, image.height)
    if longest <= side:
        return image.pixels
    size = tuple(max(1, round(length * side / longest)) for length in (image.width, image.height))
    return image.resized(size)  # type: ignore[arg-type]


def encode(pixels: np.ndarray, options: ImageOptions) -> bytes:
    """Encode (H, W, 3) uint8 as a member of the images column. The same pixels give the same bytes."""
    if options.format == "jpg":
        pixels = np.ascontiguousarray(pixels)
        return simplejpeg.encode_jpeg(pixels, quality=options.quality, colorspace="RGB", colorsubsampling="444")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, options.format, quality=options.quality)
    return buffer.getvalue()


def _known(data: bytes) -> bool:
    """Check that the bytes begin like an image of one of the formats."""
    return (
        data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM"))
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or is_tiff(data)
        or data[4:12] in (b"ftypavif", b"ftypavis")
    )


def _fault(data: bytes) -> str:
    """Classify damage: `truncated` if the format says that bytes are missing at the end, else `damaged`."""
    if data.startswith(b"\x89PNG"):
        cut = b"IEND" not in data[-32:]
    elif data.startswith(b"RIFF"):
        cut = len(data) < 12 or int.from_bytes(data[4:8], "little") + 8 > len(data)
    elif data.startswith(b"\xff\xd8"):
        cut = b"\xff\xd9" not in data[-64:]
    elif data[4:8] == b"ftyp":  # AVIF: boxes that tell their lengths
        end = 0
        while end + 8 <= len(data) and (length := int.from_bytes(data[end : end + 4], "big")) >= 8:
            end += length
        cut = end > len(data)
    else:
        cut = False
    return "truncated" if cut else "damaged"
