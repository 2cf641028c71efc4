"""Pictures of single samples, read by byte range from committed tars, checked, and made small."""

import io
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import BaseError
from PIL import Image

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.config.images import PILLOW_MAX_PIXELS
from microdit.pipeline.content.images import BadImage, decode
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.explore.rows import Place
from microdit.pipeline.explore.thumbnails import ThumbnailFolder

SIDES = {"160": 160, "320": 320, "640": 640}
TYPES = {"jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
MOST_BYTES = 64 << 20  # of a member that is read
KEPT_SHARDS = 1024  # whose offsets stay in memory: 16 bytes for each row
QUALITY = 82


class MissingPicture(RequestError):
    """There is nothing to show of a sample in a column; the message says why."""


class Members:
    """Members of committed tars by their places, for threads. The offsets of the shards that were used last stay."""

    def __init__(self, corpus: Corpus, names: Sequence[str] = ()):
        self.corpus = corpus
        self.names = names
        """Of the newest commits, sorted."""
        self._shards: OrderedDict[str, tuple[Commit, np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = Lock()

    def commit_name(self, column: str, source: str, shard: str) -> str | None:
        """Name the newest commit of a shard; None if the column is not committed for it."""
        prefix = f"commits/{column}/{source}/{shard}."
        at = bisect_left(self.names, prefix)
        name = self.names[at] if at < len(self.names) else ""
        return name if name.startswith(prefix) and COMMIT.fullmatch(name) else None

    def read(self, column: str, at: Place) -> tuple[bytes, Commit]:
        """Read the first member of a sample, and the commit that names its tar.

        Raises:
            MissingPicture: the column does not have it, or it cannot be read.
        """
        name = self.commit_name(column, *at[:2])
        if name is None:
            raise MissingPicture(f"{column} is not made for shard {at[1]}")
        try:
            commit, offsets, sizes = self._shard(name)
            if not 0 <= at[2] < len(sizes) or sizes[at[2]] < 0:
                raise MissingPicture(f"{column}: row {at[2]} of shard {at[1]} failed; its reason stands beside it")
            size = int(sizes[at[2]])
            if size > MOST_BYTES:
                raise MissingPicture(f"{column}: row {at[2]} of shard {at[1]} says that it has {size:,} bytes")
            data = self.corpus.store.get_range(commit.object.name, int(offsets[at[2]]), size)
        except MissingPicture:
            raise
        except FileNotFoundError as error:
            raise MissingPicture(f"{column}, shard {at[1]}: its object is missing; see `microdit verify`") from error
        except (OSError, ValueError, LookupError, BaseError, pa.ArrowException) as error:
            raise MissingPicture(
                f"{column}, shard {at[1]}: its object cannot be read ({first_line(error)}); `microdit verify` says more"
            ) from error
        if len(data) != size:
            raise MissingPicture(f"{column}, shard {at[1]}: its object is cut; `microdit verify` says more")
        return data, commit

    def status(self, column: str, at: Place) -> dict[str, Any] | None:
        """Read status, reason and detail of a sample in a column; None where that cannot be read."""
        name = self.commit_name(column, *at[:2])
        match = COMMIT.fullmatch(name) if name is not None else None
        if match is None:
            return None
        try:
            commit = self.corpus.commit(match[1], match[2], match[3], int(match[4]))
            lines = self.corpus.sidecar(commit, ["status", "reason", "detail"]).slice(at[2], 1).to_pylist()
        except (OSError, ValueError, BaseError, pa.ArrowException):
            return None
        return lines[0] if lines else None

    def _shard(self, name: str) -> tuple[Commit, np.ndarray, np.ndarray]:
        """Read a commit and where the rows lie in its tar; a failed row has the size -1."""
        with self._lock:
            if name in self._shards:
                self._shards.move_to_end(name)
                return self._shards[name]
        match = COMMIT.fullmatch(name)
        assert match is not None
        commit = self.corpus.commit(match[1], match[2], match[3], int(match[4]))
        sidecar = self.corpus.sidecar(commit, ["status", "offset", "size"])
        ok = pc.equal(sidecar["status"], "ok").to_numpy()
        sizes = np.where(ok, pc.fill_null(sidecar["size"], -1).to_numpy(), -1)
        found = commit, pc.fill_null(sidecar["offset"], 0).to_numpy(), sizes
        with self._lock:
            self._shards[name] = found
            while len(self._shards) > KEPT_SHARDS:
                self._shards.popitem(last=False)
        return found


class PictureReader:
    """The pictures of samples in several sizes."""

    def __init__(self, members: Members, folder: ThumbnailFolder):
        self.members, self.folder = members, folder

    def picture(self, at: Place, size: str) -> tuple[bytes, str]:
        """Read the picture of a sample, and its content type; `full` is as it is stored.

        Raises:
            MissingPicture: there is none, or it cannot be read.
        """
        name = self.members.commit_name(IMAGES, *at[:2])
        key = self.folder.key(self.members.corpus.url, name, at[2], size)
        if size != "full" and (kept := self.folder.get(key)) is not None:
            return kept, TYPES["jpeg"]
        data, _ = self.members.read(IMAGES, at)
        if size == "full":
            return data, checked_type(data)
        small = thumbnail(data, SIDES[size])
        self.folder.put(key, small)
        return small, TYPES["jpeg"]


def checked_type(data: bytes) -> str:
    """Tell the content type of a stored picture by decoding it; raises MissingPicture if it is none."""
    try:
        return TYPES[decode(data, PILLOW_MAX_PIXELS).format]
    except (BadImage, KeyError) as error:
        raise MissingPicture(f"the bytes in its tar are no picture that can be shown ({error})") from None


def thumbnail(data: bytes, side: int) -> bytes:
    """Scale a picture down to at most so many pixels a side, as JPEG; raises MissingPicture if it is none."""
    try:
        image = decode(data, PILLOW_MAX_PIXELS, side)
    except BadImage as error:
        raise MissingPicture(f"the bytes in its tar are no picture that can be shown ({error})") from None
    share = min(1.0, side / max(image.width, image.height))
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    buffer = io.BytesIO()
    Image.fromarray(image.resized(size)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
