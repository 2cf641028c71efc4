"""Hold what decoding gives: a picture, or the reason why there is none; and bound what is decoded at once."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

PIXELS_AT_ONCE = 100_000_000  # of the pictures that a process decodes at the same time: each takes about 8 bytes


class BadImage(ValueError):
    """An image that is refused: `reason` is a short code to group by, the message one line for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """A picture, upright, opaque and in sRGB.

    `width` and `height` are those of the whole picture; `source` is `scale` times as large: an array (H, W, 3), uint8,
    RGB, or a Pillow image of the mode RGB or L.
    `plain`: any decoder gives these pixels: nothing was rotated, laid on white or converted.
    """

    source: np.ndarray | Image.Image
    width: int
    height: int
    format: str
    plain: bool
    scale: float = 1.0
    profile: str = ""
    """What became of a colour profile: `converted`, `ignored` if it cannot be used, empty without one or with sRGB."""

    @cached_property
    def pixels(self) -> np.ndarray:
        """The pixels (H, W, 3), uint8, RGB."""
        return rgb_array(self.source) if isinstance(self.source, Image.Image) else self.source

    @cached_property
    def picture(self) -> Image.Image:
        """The pixels as Pillow resizes them, in the mode RGB or L: made once for all sizes."""
        return self.source if isinstance(self.source, Image.Image) else Image.fromarray(self.source)

    def resized(self, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> np.ndarray:
        """Resize to (height, width, 3) of `size` (width, height): bicubic, antialiased.

        Args:
            box: the part to take, in pixels of `source`; by default the whole picture. At a fraction that is not all
                of `source`: a JPEG of 750 rows decoded at a quarter has 188 rows, the last half beyond the picture.
        """
        box = box or (0.0, 0.0, self.width * self.scale, self.height * self.scale)
        return rgb_array(self.picture.resize(size, Image.Resampling.BICUBIC, box))


def rgb_array(image: Image.Image) -> np.ndarray:
    """Return (H, W, 3), uint8, RGB of a Pillow image."""
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


class PixelBudget:
    """Let threads work on at most `limit` pixels at the same time; a picture that is larger than that goes alone."""

    def __init__(self, limit: int):
        self._limit, self._held = limit, 0
        self._turn, self._change = threading.Lock(), threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until the pixels fit beside those that are held, and hold them."""
        with self._turn, self._change:  # the turn: small pictures do not overtake a large one for ever
            self._change.wait_for(lambda: not self._held or self._held + pixels <= self._limit)
            self._held += pixels
        try:
            yield
        finally:
            with self._change:
                self._held -= pixels
                self._change.notify_all()


BUDGET = PixelBudget(PIXELS_AT_ONCE)


class Limits:
    """Limits of one decode: `max_pixels` of a picture, and its share of what the process decodes at once."""

    def __init__(self, max_pixels: int, stack: ExitStack):
        self.max_pixels, self._stack = max_pixels, stack

    def check(self, width: int, height: int) -> None:
        """Refuse a picture with too many pixels.

        Raises:
            BadImage: `bomb`.
        """
        if width * height > self.max_pixels:
            text = f"{width}x{height} is {width * height} pixels; at most {self.max_pixels} are decoded"
            raise BadImage("bomb", text)

    def admit(self, pixels: int) -> None:
        """Wait until there is room for so many pixels, which are held until the stack is closed."""
        self._stack.enter_context(BUDGET.hold(pixels))
