"""Carry over, in a repair, the rows of a shard of images that an earlier attempt still has."""

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, BinaryIO

import pyarrow as pa

from microdit.pipeline.base.errors import DamagedError
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import MEMBER_FORMATS, BadImage, prepare
from microdit.pipeline.corpus.carried import has_hash
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, OBJECT, ShardId
from microdit.pipeline.corpus.records import UNREPAIRED, Commit, ObjectRef
from microdit.pipeline.corpus.redeclare import DECLARATION
from microdit.pipeline.corpus.shard_files import SIDECAR, open_table

LARGEST_NOTE = 16 << 20  # bytes of a row's JSON
GONE = {"http_404", "http_410"}
"""Reasons that say that an input will not come back: nothing is left to repair it with."""


@dataclass(frozen=True)
class Candidate:
    """A row as one attempt has it."""

    tar: str
    line: dict[str, Any]
    """Of the sidecar."""
    checked: bool
    """The sidecar has the hash that its commit says."""


@dataclass(frozen=True)
class SavedRow:
    """A row that can still be read; `exact` if its bytes have the hash that they had."""

    line: dict[str, Any]
    data: bytes
    exact: bool


class Salvage:
    """Readable rests of one shard: in the generations below the one to write, and in attempts without a commit.

    A stored picture is exact if it has the hash of the bytes that came. One that was converted when it came has no hash
    of its own: it is used if it decodes to its size, and only where its source cannot be had again. What a sidecar says
    is believed if it has the hash that its commit says, or the tar says the same.
    """

    def __init__(self, corpus: Corpus, shard: ShardId, generation: int, options: ImageOptions):
        self._corpus, self._shard, self._options = corpus, shard, options
        self._commits = [self._commit(number) for number in reversed(range(generation))]
        self.keys: list[str] | None = None
        """Of all rows, by the newest sidecar that is as its commit says; None if there is none."""
        self.sha256: list[str | None] = []
        """Of the bytes that came, by the same sidecar."""
        self._files: dict[str, BinaryIO] = {}
        self._lock = Lock()
        self._candidates: dict[int, list[Candidate]] = defaultdict(list)
        for tar, sidecar, checked in self._attempts():
            self._add(tar, sidecar, checked)

    def saved(self, row: int) -> SavedRow | None:
        """Read a row, from the newest attempt that has it exactly or, without one, that has it in a usable state."""
        read = [(item, data) for item in self._candidates.get(row, ()) if (data := self._read(item)) is not None]
        for item, data in read:
            if hashlib.sha256(data).hexdigest() == item.line["sha256"]:
                return SavedRow(item.line, data, exact=True)
        return next((SavedRow(item.line, data, exact=False) for item, data in read if self._usable(item, data)), None)

    @cached_property
    def exact(self) -> frozenset[int]:
        """The rows that need not be fetched."""
        return frozenset(row for row in sorted(self._candidates) if (saved := self.saved(row)) and saved.exact)

    @property
    def declaration(self) -> int:
        """The number of the declaration that the texts of the newest commit are of."""
        timings = next((commit.timings for commit in self._commits if commit is not None), {})
        return int(timings.get(DECLARATION, 0))

    def had(self, row: int) -> bool:
        """Return True if an attempt had this row."""
        return row in self._candidates

    @property
    def good(self) -> int:
        """The number of good rows, by the newest commit."""
        return next((commit.counts.get("out", 0) for commit in self._commits if commit is not None), 0)

    @cached_property
    def waits(self) -> bool:
        """The newest generation is whole, and made again only for rows that could not be fetched the last time."""
        newest = self._commits[0] if self._commits else None
        if newest is None or not newest.timings.get(UNREPAIRED):
            return False
        return all(self._has_hash(ref) for ref in (newest.object, newest.sidecar))

    # -- reading -------------------------------------------------------------------------------------------------------

    def _commit(self, generation: int) -> Commit | None:
        try:
            return self._corpus.commit(IMAGES, *self._shard, generation)
        except (DamagedError, FileNotFoundError):
            return None

    def _attempts(self) -> Iterator[tuple[str, pa.Table, bool]]:
        """List the tar and the sidecar of each attempt, and if the sidecar is as a commit says; checked ones first."""
        damaged: list[tuple[str, str]] = []
        for commit in self._commits:
            if commit is None:
                continue
            if self._has_hash(commit.sidecar):
                yield commit.object.name, self._sidecar(commit.sidecar.name), True
            else:
                damaged.append((commit.object.name, commit.sidecar.name))
        if not self._commits or None in self._commits:  # a commit that is gone or damaged named some of these
            damaged += self._unnamed()
        for tar, name in damaged:
            try:
                yield tar, self._sidecar(name), False
            except (FileNotFoundError, pa.ArrowException, ValueError, OSError):
                continue

    def _sidecar(self, name: str) -> pa.Table:
        """Read a sidecar, whatever its commit says of its rows; an empty one if they are more than a shard has."""
        file = open_table(io.BytesIO(self._corpus.store.get(name)))
        return file.read() if file.metadata.num_rows <= self._corpus.shard_samples else SIDECAR.empty_table()

    def _unnamed(self) -> Iterator[tuple[str, str]]:
        named = {commit.object.name for commit in self._commits if commit is not None}
        names = self._corpus.store.names(f"{IMAGES}/{self._shard[0]}")
        for name in sorted((name for name in names if name.endswith(".tar")), reverse=True):
            match = OBJECT.fullmatch(name)
            if match and match[3] == self._shard[1] and name not in named:
                yield name, f"{name.removesuffix('.tar')}.rows.parquet"

    def _add(self, tar: str, sidecar: pa.Table, checked: bool) -> None:
        lines = sidecar.to_pylist()
        if self.keys is None and checked:
            self.keys = [line["key"] for line in lines]
            self.sha256 = [line.get("sha256") for line in lines]
        for line in lines:
            if line.get("status") == "ok" and line.get("size") is not None and line.get("width") is not None:
                self._candidates[line["row"]].append(Candidate(tar, line, checked))

    def _read(self, item: Candidate) -> bytes | None:
        """Read the picture of a row; None if it, or its line, is not whole."""
        start, size = item.line["offset"], item.line["size"]
        try:
            data = self._range(item.tar, start, size)
            if not (len(data) == size == item.line["bytes"]):
                return None
            return data if item.checked or self._note_agrees(item, start + _padded(size)) else None
        except FileNotFoundError:
            return None

    def _range(self, tar: str, start: int, size: int) -> bytes:
        """Read a part of a tar; less where it ends before."""
        with self._lock:
            if tar not in self._files:
                self._files[tar] = self._corpus.store.open(tar)
            self._files[tar].seek(start)
            return self._files[tar].read(size)

    def _note_agrees(self, item: Candidate, start: int) -> bool:
        """Compare a line with the JSON that follows the picture in the tar."""
        try:
            header = tarfile.TarInfo.frombuf(self._range(item.tar, start, tarfile.BLOCKSIZE), "utf-8", "strict")
            note = json.loads(self._range(item.tar, start + tarfile.BLOCKSIZE, min(header.size, LARGEST_NOTE)))
            return bool(note) and all(item.line[name] == value for name, value in note.items() if name != "source")
        except (tarfile.TarError, ValueError, KeyError, AttributeError):
            return False

    def _usable(self, item: Candidate, data: bytes) -> bool:
        """Check a picture that has not the hash of what came: it was converted, and decodes to its size."""
        line = item.line
        same_size = (line["width"], line["height"]) == (line["original_width"], line["original_height"])
        if same_size and line["format"] == MEMBER_FORMATS[self._options.format]:
            return False  # most of these were kept as they came, and so this one is damaged
        try:
            picture = prepare(data, self._options)
        except BadImage:
            return False
        return (picture.width, picture.height) == (line["width"], line["height"])

    def _has_hash(self, ref: ObjectRef) -> bool:
        return has_hash(self._corpus.store, ref)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
