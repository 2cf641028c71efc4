"""Decode untrusted bytes to pixels, and encode pixels for storage. Everything is bounded before it is decoded.

Accepted are JPEG, PNG, WebP, AVIF, GIF and BMP with one picture in them, and the first page of a TIFF. EXIF rotation is
applied, palettes are resolved, transparency is laid on white, CMYK, gray and 16-bit become 8-bit RGB. Animations are
refused: their captions describe no single frame. ICC profiles are not applied.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.tiff import UnsupportedTiffError, check_tiff, is_tiff

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
MEMBER_FORMATS = {"jpg": "jpeg", "png": "png", "webp": "webp"}
LONGEST = {"jpg": 65_500, "png": 2**31 - 1, "webp": 16_383}  # pixels of a side that each format can hold
ORIENTATION = 0x0112
MAX_SCANS = 200  # of a progressive JPEG, which has about ten; each costs a pass over the whole picture
SHRINK_MARGIN = 1.25  # a JPEG is decoded at least this much larger than the size that it is resized to


class BadImage(ValueError):
    """An image that is refused: `reason` is a short code to group by, the message one line for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """A picture, upright.

    `width` and `height` are those of the whole picture; `pixels` (H, W, 3), uint8, RGB, is `scale` times as large.
    `plain`: any decoder gives these pixels: nothing was rotated, laid on white or converted.
    """

    pixels: np.ndarray
    width: int
    height: int
    format: str
    plain: bool
    scale: float = 1.0

    @cached_property
    def picture(self) -> Image.Image:
        """The pixels as Pillow resizes them: a copy, made once for all sizes."""
        return Image.fromarray(self.pixels)


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


def prepare(data: bytes, options: ImageOptions) -> Prepared:
    """Decode an image whole and encode it for storage; bytes that need no change are kept as they came.

    Raises:
        BadImage: as `decode` does, and with `too_small` or `too_long`.
    """
    image = decode(data, options.max_pixels, options.max_side)
    short = min(image.width, image.height)
    if short < options.min_side:
        raise BadImage("too_small", f"{image.width}x{image.height}; the short side must have {options.min_side} pixels")
    if options.max_side is not None and short > options.max_side:
        size = short_side_size(image.width, image.height, options.max_side)
        # a JPEG of 750 rows decoded at a quarter has 188 rows, the last of which is half beyond the picture
        box = (0.0, 0.0, image.width * image.scale, image.height * image.scale)
        pixels = np.asarray(Image.fromarray(image.pixels).resize(size, Image.Resampling.BICUBIC, box))
    elif image.plain and image.format == MEMBER_FORMATS[options.format]:
        return Prepared(data, image.width, image.height, image.width, image.height, image.format)
    else:
        pixels = image.pixels
    height, width = pixels.shape[:2]
    if max(width, height) > (longest := LONGEST[options.format]):
        raise BadImage("too_long", f"{width}x{height}; a side of a {options.format} has {longest} pixels at most")
    return Prepared(encode(pixels, options), width, height, image.width, image.height, image.format)


def decode(data: bytes, max_pixels: int, shrink_to: int | None = None) -> Decoded:
    """Decode an image whole.

    Args:
        max_pixels: width times height, known from the header, above which nothing is decoded.
        shrink_to: JPEGs may be decoded at a fraction of their size, as long as the short side stays this many pixels
            and a quarter more: for a resize to `shrink_to`.

    Raises:
        BadImage: with the reason `not_an_image`, `bomb`, `truncated`, `damaged` or `animated`.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _decode_jpeg(data, max_pixels, shrink_to)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _bound(image.width, image.height, max_pixels)
            if image.format == "TIFF":  # of several pages the first; to count them would read the whole file
                check_tiff(image)
            elif getattr(image, "is_animated", False):
                raise BadImage("animated", f"{image.format} with several frames; expected one picture")
            decoded = _decode_pillow(image, str(image.format).lower())
            if image.format == "PNG" and _may_lack_rows(image):
                _check_png_rows(data)
            return decoded
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
    box = (0.0, 0.0, image.width * image.scale, image.height * image.scale)
    return np.asarray(Image.fromarray(image.pixels).resize(size, Image.Resampling.BICUBIC, box))  # type: ignore[arg-type]


def encode(pixels: np.ndarray, options: ImageOptions) -> bytes:
    """Encode (H, W, 3) uint8 as a member of the images column. The same pixels give the same bytes."""
    if options.format == "jpg":
        pixels = np.ascontiguousarray(pixels)
        return simplejpeg.encode_jpeg(pixels, quality=options.quality, colorspace="RGB", colorsubsampling="444")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, options.format, quality=options.quality)
    return buffer.getvalue()


def _decode_jpeg(data: bytes, max_pixels: int, shrink_to: int | None) -> Decoded:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _bound(width, height, max_pixels)
    if (scans := _scans(data)) > MAX_SCANS:
        raise BadImage("bomb", f"a JPEG of {scans} scans; at most {MAX_SCANS} are decoded")
    if colours not in ("YCbCr", "RGB", "Gray"):
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return _decode_pillow(image, "jpeg")
    orientation = _orientation(data)
    least: dict[str, Any] = {}
    if shrink_to is not None and min(width, height) >= 2 * shrink_to * SHRINK_MARGIN and orientation == 1:
        least = {"min_" + side: int(shrink_to * SHRINK_MARGIN) for side in ("width", "height")} | {"min_factor": 2}
    try:
        pixels = simplejpeg.decode_jpeg(data, **least)
    except ValueError as error:
        # some cameras write stray bytes between a complete picture and its end marker
        if "before marker 0xd9" not in str(error):
            raise
        pixels = simplejpeg.decode_jpeg(data, strict=False, **least)
    if orientation >= 5:
        width, height = height, width
    scale = 1.0 if not least else round(8 * pixels.shape[0] / height) / 8
    return Decoded(_upright(pixels, orientation), width, height, "jpeg", orientation == 1, scale)


def _scans(data: bytes) -> int:
    """Count the markers of scans, FF DA. `bytes.count` would take a tenth of the decoding's time."""
    pairs = (np.frombuffer(data, "<u2", (len(data) - first) // 2, first) for first in (0, 1) if len(data) > first + 1)
    return sum(int(np.count_nonzero(pair == 0xDAFF)) for pair in pairs)


def _orientation(data: bytes) -> int:
    """Read the EXIF orientation of a JPEG, 1 to 8; 1 (upright) if there is none or it cannot be read."""
    if not _has_exif(data):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data; the picture may be whole
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _has_exif(data: bytes) -> bool:
    """Search the segments before a JPEG's picture for EXIF data."""
    at = 2
    while data.startswith(b"\xff", at) and at + 4 <= len(data) and data[at + 1] != 0xDA:  # the picture begins there
        if data[at + 1] == 0xFF:  # filling
            at += 1
            continue
        if data[at + 1] == 0xE1 and data.startswith(b"Exif\0\0", at + 4):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_pillow(image: Image.Image, format_name: str) -> Decoded:
    image.load()
    turned = ImageOps.exif_transpose(image)
    plain = image.mode in ("RGB", "L") and "transparency" not in image.info and turned.size == image.size
    plain = plain and image.getexif().get(ORIENTATION, 1) == 1
    if turned.mode.startswith("I"):  # 16 bits of gray
        gray = np.asarray(turned)
        rgb = np.repeat((gray.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    elif turned.has_transparency_data:
        white = Image.new("RGBA", turned.size, "white")
        rgb = np.asarray(Image.alpha_composite(white, turned.convert("RGBA")).convert("RGB"))
    else:
        rgb = np.asarray(turned.convert("RGB"))
    return Decoded(rgb, turned.width, turned.height, format_name, plain)


def _may_lack_rows(image: Image.Image) -> bool:
    """Check for a last pixel of zeros, as of missing rows, or an interlaced PNG, whose rows come in another order."""
    last: Any = image.getpixel((image.width - 1, image.height - 1))
    return bool(image.info.get("interlace")) or not any(last if isinstance(last, tuple) else (last,))


def _check_png_rows(data: bytes) -> None:
    """Refuse a PNG with fewer rows than its header says, which Pillow leaves black without an error."""
    width, height, depth, colours, _, _, interlaced = struct.unpack_from(">2I5B", data, 16)
    bits = depth * {2: 3, 4: 2, 6: 4}.get(colours, 1)
    if interlaced:  # x and y of the first pixel of each pass, and the steps from there
        passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
        sizes = [(-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in passes]
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


def _bound(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage("bomb", f"{width}x{height} is {width * height} pixels; at most {max_pixels} are decoded")


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
