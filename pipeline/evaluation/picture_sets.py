"""Read a folder of pictures to evaluate, or to compare with, each with its caption where there is one."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.images import PILLOW_MAX_PIXELS
from microdit.pipeline.content.crop import square
from microdit.pipeline.content.images import BadImage, decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LONGEST_CAPTION = 10_000  # bytes of a text file that are read
PROMPT = "prompt"  # the text field of a PNG that `microdit generate` writes


@dataclass(frozen=True)
class PictureSet:
    """The pictures of a folder and its subfolders, by name; `size` as `open_pictures` takes it."""

    folder: Path
    paths: tuple[Path, ...]
    size: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Height and width of the first picture, which all have."""
        return self.read(self.paths[0]).shape[:2]

    def read(self, path: Path) -> np.ndarray:
        """Decode a picture: uint8 (H, W, 3).

        Raises:
            RequestError: it is damaged or has transparency.
        """
        try:
            pixels = decode(path.read_bytes(), PILLOW_MAX_PIXELS).pixels
        except (BadImage, OSError) as error:
            raise RequestError(f"picture {path}: {error}; a set is measured whole, so mend or remove it") from None
        if _transparent(path):
            raise RequestError(
                f"picture {path}: it has transparency, which every tool lays on another ground; save it without"
            )
        return pixels if self.size is None else square(pixels, self.size)

    def pixels(self, seen: Callable[[], None] | None = None) -> Iterator[np.ndarray]:
        """Decode all pictures in order; `seen` is called after each.

        Raises:
            RequestError: as `read`, or they are not of one size.
        """
        for path in self.paths:
            pixels = self.read(path)
            if pixels.shape[:2] != self.shape:
                raise RequestError(
                    f"pictures {self.folder}: {self.paths[0].name} has {_size(self.shape)} pixels and {path.name} "
                    f"{_size(pixels.shape)}; give --size N to resize and crop all to N x N"
                )
            yield pixels
            if seen is not None:
                seen()

    def captions(self) -> list[str]:
        """Find the caption of each picture: the text file of its name, else the PNG's text field `prompt`.

        Raises:
            RequestError: a picture has none.
        """
        return [self._caption(path) for path in self.paths]

    def _caption(self, path: Path) -> str:
        text = path.with_suffix(".txt")
        if text.is_file():
            return text.read_bytes()[:LONGEST_CAPTION].decode("utf-8", "replace").strip()
        try:
            with Image.open(path) as image:
                caption = str(image.info.get(PROMPT, "")).strip()
        except OSError as error:
            raise RequestError(f"picture {path}: {error}") from None
        if not caption:
            raise RequestError(
                f"picture {path}: it has no caption; expected {text.name} beside it, or a PNG of `microdit generate`"
            )
        return caption

    def identity(self) -> str:
        """Hash names and bytes of all pictures."""
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                data = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(self.folder)}\0{data}\n".encode())
        return digest.hexdigest()

    def first(self, count: int) -> "PictureSet":
        """Keep the first so many."""
        return replace(self, paths=self.paths[:count])


def open_pictures(folder: Path, what: str, size: int | None = None) -> PictureSet:
    """Open a folder of pictures.

    Args:
        what: how messages call it.
        size: resize the short side of each picture to so many pixels and crop the centre square.

    Raises:
        RequestError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise RequestError(f"{what} {folder}: there is no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise RequestError(f"{what} {folder}: it holds no pictures; expected files in {', '.join(SUFFIXES)}")
    return PictureSet(folder, tuple(paths), size)


def _transparent(path: Path) -> bool:
    """Check for an alpha channel that is not opaque all over, or a transparent colour."""
    with Image.open(path) as image:
        if "A" in image.getbands():
            return image.getchannel("A").getextrema()[0] != 255
        return "transparency" in image.info


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
