"""Read single samples out of committed tars, and make small pictures of them."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from obstore.exceptions import BaseError
from PIL import Image

from microdit.pipeline.base.errors import first_line
from microdit.pipeline.config.images import PILLOW_MAX_PIXELS
from microdit.pipeline.content.images import BadImage, decode
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit

THUMBNAIL = 120  # pixels of the long side


@dataclass(frozen=True)
class SampleRef:
    """A sample's id (`source/key`) and its row in a shard."""

    id: str
    source: str
    shard: str
    row: int


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of a sample, and the words below it; `keep` frames it."""

    id: str
    uri: str
    width: int
    height: int
    caption: str = ""
    keep: bool = False


class Reader:
    """Read single samples out of committed tars; sidecars that were read are kept.

    `notes` gets a line for each object that cannot be read: its samples are left out.
    """

    def __init__(self, corpus: Corpus, commits: Mapping[str, Sequence[Commit]], notes: list[str]):
        self.corpus, self.notes = corpus, notes
        self.commits = {(c.column, c.source, c.shard): c for of_column in commits.values() for c in of_column}
        self.sidecars: dict[str, pa.Table] = {}
        self._lost: set[str] = set()

    def member(self, column: str, ref: SampleRef) -> bytes | None:
        """Read the first member of a sample; None if the column does not have it, or it cannot be read."""
        commit = self.commits.get((column, ref.source, ref.shard))
        if commit is None or commit.name in self._lost:
            return None
        try:
            if commit.name not in self.sidecars:
                self.sidecars[commit.name] = self.corpus.sidecar(commit).select(["status", "offset", "size"])
            line = self.sidecars[commit.name].slice(ref.row, 1).to_pylist()[0]
            if line["status"] != "ok":
                return None
            return self.corpus.store.get_range(commit.object.name, line["offset"], line["size"])
        except (OSError, ValueError, LookupError, BaseError) as error:
            self._give_up(commit, error)
            return None

    def caption(self, column: str, ref: SampleRef) -> str:
        """Read the caption of a sample; empty if the column does not have it, or it cannot be read."""
        commit = self.commits.get((column, ref.source, ref.shard))
        if commit is None or commit.name in self._lost:
            return ""
        try:
            if commit.name not in self.sidecars:
                self.sidecars[commit.name] = self.corpus.sidecar(commit, ["caption"])
            return str(self.sidecars[commit.name]["caption"][ref.row].as_py() or "")
        except (OSError, ValueError, LookupError, BaseError) as error:
            self._give_up(commit, error)
            return ""

    def _give_up(self, commit: Commit, error: Exception) -> None:
        """Note an object that cannot be read, once."""
        self._lost.add(commit.name)
        self.notes.append(f"{commit.column}, shard {commit.shard}: its object cannot be read: {first_line(error)}")

    def image(self, ref: SampleRef) -> Image.Image | None:
        """Read the picture of a sample; None if it cannot be read (`verify` says why)."""
        data = self.member(IMAGES, ref)
        if data is None:
            return None
        try:
            return Image.fromarray(decode(data, PILLOW_MAX_PIXELS).pixels)
        except BadImage:
            return None

    def latent(self, column: str, ref: SampleRef) -> np.ndarray | None:
        """Read the latent of a sample, (c, h, w); None if the column does not have it, or it cannot be read."""
        data = self.member(column, ref)
        try:
            return None if data is None else array_from_bytes(data)
        except ValueError:
            return None


def thumbnail(reader: Reader, ref: SampleRef) -> Thumbnail | None:
    """Read a small picture of a sample; None if it cannot be read (`verify` says why)."""
    image = reader.image(ref)
    if image is None:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return Thumbnail(ref.id, data_uri(image), image.width, image.height)


def data_uri(image: Image.Image) -> str:
    """Encode a picture for the page itself: PNG where that is small (drawings), JPEG otherwise."""
    buffer, kind = io.BytesIO(), "png"
    image.save(buffer, "PNG", optimize=True)
    if buffer.tell() > 4096 + image.width * image.height // 2:
        buffer, kind = io.BytesIO(), "jpeg"
        image.save(buffer, "JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
