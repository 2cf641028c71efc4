"""Read sets of pictures to evaluate, or to compare with, each with its caption: folders and webdatasets."""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.images import PILLOW_MAX_PIXELS
from microdit.pipeline.content.crop import square
from microdit.pipeline.content.images import BadImage, decode
from microdit.pipeline.files.archives import is_of_macos
from microdit.pipeline.files.tars import tar_members

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LONGEST_CAPTION = 10_000  # bytes of a text that are read
LARGEST_MEMBER = 1 << 28  # bytes of a picture in a tar
PROMPT = "prompt"  # the text field of a PNG that `microdit generate` writes


@dataclass(frozen=True)
class StoredPicture:
    """The bytes of a picture, its name within its set, and the caption that stands beside it."""

    name: str
    data: bytes
    text: str | None = None

    @property
    def caption(self) -> str:
        """The caption beside it, else the PNG's text field `prompt`; empty if there is neither."""
        if self.text is not None:
            return self.text
        try:
            with Image.open(io.BytesIO(self.data)) as image:
                return str(image.info.get(PROMPT, "")).strip()
        except (OSError, ValueError) as error:
            raise RequestError(f"picture {self.name}: {error}") from None

    @property
    def sha256(self) -> str:
        """The hash of its bytes."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class PictureSet:
    """Pictures that can be read again and again in one order; `size` as `open_pictures` takes it."""

    where: str
    count: int
    stream: Callable[[], Iterator[StoredPicture]]
    size: int | None = None
    on_white: bool = False
    """Lay transparency on white, as a corpus does, and refuse it not."""

    def __len__(self) -> int:
        return self.count

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Height and width of the first picture, which all have."""
        return self.decoded(next(self.stream())).shape[:2]

    def decoded(self, picture: StoredPicture) -> np.ndarray:
        """Decode a picture: uint8 (H, W, 3).

        Raises:
            RequestError: it is damaged or has transparency.
        """
        try:
            pixels = decode(picture.data, PILLOW_MAX_PIXELS).pixels
        except BadImage as error:
            raise RequestError(
                f"picture {picture.name}: {error}; a set is measured whole, so mend or remove it"
            ) from None
        if not self.on_white and _transparent(picture.data):
            raise RequestError(
                f"picture {picture.name}: it has transparency, which every tool lays on another ground; save it without"
            )
        return pixels if self.size is None else square(pixels, self.size)

    def pixels(self, seen: Callable[[], None] | None = None) -> Iterator[np.ndarray]:
        """Decode all pictures in order; `seen` is called after each.

        Raises:
            RequestError: as `decoded`, or they are not of one size.
        """
        first = ""
        for picture in self.stream():
            first = first or picture.name
            pixels = self.decoded(picture)
            if pixels.shape[:2] != self.shape:
                raise RequestError(
                    f"pictures {self.where}: {first} has {_size(self.shape)} pixels and {picture.name} "
                    f"{_size(pixels.shape)}; give --size N to resize and crop all to N x N"
                )
            yield pixels
            if seen is not None:
                seen()

    def captioned(self) -> Iterator[StoredPicture]:
        """Read the pictures, each of which must have a caption.

        Raises:
            RequestError: a picture has none.
        """
        for picture in self.stream():
            if not picture.caption:
                text = Path(picture.name).with_suffix(".txt").name
                expected = f"expected {text} beside it, or a PNG of `microdit generate`"
                advice = "select samples that have one" if self.on_white else expected
                raise RequestError(f"picture {picture.name}: it has no caption; {advice}")
            yield picture

    def captions(self) -> list[str]:
        """Find the caption of each picture. Raises as `captioned`."""
        return [picture.caption for picture in self.captioned()]

    @cached_property
    def identity(self) -> str:
        """Hash names and bytes of all pictures."""
        digest = hashlib.sha256()
        for picture in self.stream():
            digest.update(f"{picture.name}\0{picture.sha256}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def is_tars(path: Path) -> bool:
    """Check for a tar, or a folder of tars without pictures beside them."""
    if path.is_file():
        return path.suffix == ".tar"
    return path.is_dir() and any(path.glob("*.tar")) and not _pictures_below(path)


def open_pictures(where: Path, what: str, size: int | None = None) -> PictureSet:
    """Open a folder of pictures, a tar, or a folder of tars (a webdataset).

    Args:
        what: how messages call it.
        size: resize the short side of each picture to so many pixels and crop the centre square.

    Raises:
        RequestError: there is no such folder, no picture in it, or a tar is damaged.
    """
    if is_tars(where):
        tars = [where] if where.is_file() else sorted(where.glob("*.tar"))
        count = sum(1 for _ in _of_tars(tars, read=False))
        stream: Callable[[], Iterator[StoredPicture]] = lambda: _of_tars(tars)  # noqa: E731
        expected = f"expected members in {', '.join(SUFFIXES)}"
    else:
        if not where.is_dir():
            raise RequestError(f"{what} {where}: there is no such folder")
        paths = _pictures_below(where)
        count, expected = len(paths), f"expected files in {', '.join(SUFFIXES)}"
        stream = lambda: (_of_file(where, path) for path in paths)  # noqa: E731
    if not count:
        raise RequestError(f"{what} {where}: it holds no pictures; {expected}")
    return PictureSet(str(where), count, stream, size)


def first_pictures(pictures: PictureSet, count: int) -> list[StoredPicture]:
    """Read the first so many."""
    return list(islice(pictures.stream(), count))


def _pictures_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _of_file(folder: Path, path: Path) -> StoredPicture:
    """Read a picture, and the text file of its name."""
    text = path.with_suffix(".txt")
    try:
        caption = _text(text.read_bytes()) if text.is_file() else None
        return StoredPicture(path.relative_to(folder).as_posix(), path.read_bytes(), caption)
    except OSError as error:
        raise RequestError(f"picture {path}: {error}") from None


def _of_tars(tars: list[Path], read: bool = True) -> Iterator[StoredPicture]:
    """Read the pictures of tars in their order; the members of a sample follow each other, as in every webdataset.

    read: False gives the names alone.
    """
    for path in tars:
        key, picture, text = "", None, None
        for member in tar_members(path, lambda name: name.lower().endswith((*SUFFIXES, ".txt")), LARGEST_MEMBER):
            if member.data is None:
                raise RequestError(
                    f"{path}, {member.name or 'the tar'}: {member.detail}; a set is measured whole, so make it again"
                )
            if is_of_macos(member.name):
                continue
            folder, _, base = member.name.rpartition("/")
            name = f"{folder}/{base.partition('.')[0]}"
            if name != key:
                if picture is not None:
                    yield StoredPicture(*picture, text)
                key, picture, text = name, None, None
            if base.lower().endswith(".txt"):
                text = _text(member.data)
            elif picture is None:
                picture = (f"{path.name}/{member.name}", member.data if read else b"")
            else:
                raise RequestError(f"{path}: sample {name.lstrip('/')!r} has two pictures, the second is {member.name}")
        if picture is not None:
            yield StoredPicture(*picture, text)


def _text(data: bytes) -> str:
    return data[:LONGEST_CAPTION].decode("utf-8", "replace").strip()


def _transparent(data: bytes) -> bool:
    """Check for an alpha channel that is not opaque all over, or a transparent colour."""
    with Image.open(io.BytesIO(data)) as image:
        if "A" in image.getbands():
            return image.getchannel("A").getextrema()[0] != 255
        return "transparency" in image.info


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
