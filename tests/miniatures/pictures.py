"""Distinct pictures, one for every name, in the file formats of the datasets."""

import hashlib
import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 512  # what a longer short side is reduced to, and the least that is taken: facts 0.3
LEAST = 256
GRAY = "/gray"  # behind the names of those without colours
TURNED = 6  # EXIF: to be turned by 90 degrees clockwise


@dataclass(frozen=True)
class Picture:
    """A picture as a file. `kept`: its bytes are stored as they came; `size`: its width and height, upright."""

    name: str
    size: tuple[int, int]
    data: bytes
    kept: bool

    def stored_size(self) -> tuple[int, int]:
        """Width and height after the reduction."""
        width, height = self.size
        if min(width, height) <= SIDE:
            return self.size
        return (SIDE, SIDE * height // width) if width <= height else (SIDE * width // height, SIDE)

    def difference(self, stored: bytes) -> float:
        """Mean difference per channel, of 255, of the stored and the drawn picture; infinite for other sizes."""
        with Image.open(io.BytesIO(stored)) as image:
            found = np.asarray(image.convert("RGB"), np.float32)
        wanted = reduced(self.name, self.size, self.stored_size())
        return float(np.abs(found - wanted).mean()) if found.shape == wanted.shape else float("inf")


@cache
def draw(name: str, size: tuple[int, int]) -> Image.Image:
    """Draw the picture of a name: four fields and a disc off the middle, asymmetric under turns and mirrors."""
    random = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    colours = [tuple(int(c) for c in random.integers(16, 240, 3)) for _ in range(5)]
    width, height = size
    image = Image.new("RGB", size, colours[0])
    pen = ImageDraw.Draw(image)
    across, down = (int(side * random.uniform(0.35, 0.65)) for side in size)
    pen.rectangle((across, 0, width, down), colours[1])
    pen.rectangle((0, down, across, height), colours[2])
    pen.rectangle((across, down, width, height), colours[3])
    pen.ellipse((width // 8, height // 8, width // 2, height // 3), colours[4])
    return image


@cache
def reduced(name: str, size: tuple[int, int], to: tuple[int, int]) -> np.ndarray:
    """Draw the picture of a name, reduced: (H, W, 3) float32."""
    image = draw(name, size).resize(to, Image.Resampling.BICUBIC)
    if name.endswith(GRAY):
        image = image.convert("L").convert("RGB")
    return np.asarray(image, np.float32)


def picture(name: str, size: tuple[int, int], kind: str = "jpg") -> Picture:
    """Encode a picture as a file of a kind.

    Args:
        kind: jpg, jpg-gray, jpg-cmyk, jpg-turned (by EXIF), jpg-cut (a half is missing), png, png-alpha (all opaque),
            webp (lossless), or html (a page where an image should be).
    """
    if kind == "jpg-gray":
        name += GRAY
    image, buffer = draw(name, size), io.BytesIO()
    plain = kind in ("jpg", "jpg-gray")
    match kind:
        case "html":
            return Picture(name, size, b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n", False)
        case "jpg" | "jpg-cut":
            image.save(buffer, "JPEG", quality=93)
        case "jpg-gray":
            image.convert("L").save(buffer, "JPEG", quality=93)
        case "jpg-cmyk":
            image.convert("CMYK").save(buffer, "JPEG", quality=95)
        case "jpg-turned":
            exif = Image.Exif()
            exif[0x0112] = TURNED
            image.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=93, exif=exif)
        case "png":
            image.save(buffer, "PNG", compress_level=1)
        case "png-alpha":
            image.convert("RGBA").save(buffer, "PNG", compress_level=1)
        case "webp":
            image.save(buffer, "WEBP", lossless=True, quality=0, method=0)
        case _:
            raise ValueError(kind)
    data = buffer.getvalue()
    if kind == "jpg-cut":
        data = data[: len(data) // 2]
    return Picture(name, size, data, plain and LEAST <= min(size) <= SIDE)
