"""Committed shards opened for reading row by row; each object is checked against its commit.

Damage is distinguished from a storage that fails: an object that is missing, cut, or has other bytes than the commit
says, and a row that is no array, raise `BrokenError`. A transient failure of a bucket is no damage: the store tries
again, and when it gives up that is a `RequestError`.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.arrays import array_view
from microdit.pipeline.corpus.disk_cache import DiskCache
from microdit.pipeline.corpus.quantised import Field, Quantised
from microdit.pipeline.corpus.records import Commit, ObjectRef
from microdit.pipeline.corpus.shard_files import open_table
from microdit.pipeline.storage.store import Store


class BrokenError(Exception):
    """A row, or its whole shard, cannot be read, and never will be."""


def is_finite(value: Field) -> bool:
    """Check that all numbers of a row are finite."""
    array = value.scale if isinstance(value, Quantised) else value
    if array.dtype == np.float16:  # by its bits: 30 times as fast as numpy's own
        return int((array.view(np.uint16) & 0x7FFF).max(initial=0)) < 0x7C00
    return bool(np.isfinite(array).all())


class OpenShard:
    """One shard of one column: its bytes, and where in them each row lies.

    data: the object's file, its bytes, or a function of start and length that reads them.
    """

    def __init__(self, name: str, data: FileIO | memoryview | Callable[[int, int], bytes], sidecar: pa.Table):
        ok = pc.equal(sidecar["status"], "ok").to_numpy()
        self._name, self._data = name, data
        self._size = np.where(ok, pc.fill_null(sidecar["size"], 0).to_numpy(), -1)
        self._offset = pc.fill_null(sidecar["offset"], 0).to_numpy()

    @property
    def memory(self) -> int:
        """Bytes of it that are held in memory."""
        return len(self._data) if isinstance(self._data, memoryview) else 0

    def field(self, row: int) -> Field:
        """Read what a row holds: a view of its `.npy`, or the parts of quantised text.

        Raises:
            BrokenError: there is no such row, or it cannot be decoded.
            RequestError: the storage fails.
        """
        try:
            if not 0 <= row < len(self._size) or self._size[row] < 0:
                raise ValueError("its sidecar has no such row")
            return array_view(self._bytes(int(self._offset[row]), int(self._size[row])))
        except FileNotFoundError:
            raise BrokenError(f"{self._name} is not there") from None
        except (OSError, BaseError) as error:
            raise RequestError(f"{self._name} cannot be read: {error}") from error
        except ValueError as error:
            raise BrokenError(f"{self._name}: {error}") from None

    def _bytes(self, start: int, size: int) -> memoryview:
        if isinstance(self._data, memoryview):
            return self._data[start : start + size]
        if isinstance(self._data, FileIO):
            return memoryview(os.pread(self._data.fileno(), size, start))
        return memoryview(self._data(start, size))


class ShardReader:
    """Opens shards of a store. disk: keeps copies of what comes from a bucket; a folder is read where it is.

    An object is checked against its commit when it is read the first time, and each time that it comes from a bucket or
    from a copy that another process may have made.
    """

    def __init__(self, store: Store, disk: DiskCache | None = None):
        self.store, self.disk = store, disk if store.root is None else None
        self._checked: set[str] = set()

    def open(self, commit: Commit, sidecar: Future[FileIO | memoryview]) -> OpenShard:
        """Read a shard's object; `sidecar` is what `read` gives for its sidecar. Raises as `read`."""
        data = self.read(commit.object)
        return OpenShard(commit.object.name, data, _table(commit, sidecar.result()))

    def open_ranges(self, commit: Commit) -> OpenShard:
        """Read a shard's sidecar alone: each row is read from the store when it is asked for. Raises as `read`."""
        data = partial(self.store.get_range, commit.object.name)
        return OpenShard(commit.object.name, data, _table(commit, self.read(commit.sidecar)))

    def read(self, ref: ObjectRef) -> FileIO | memoryview:
        """Read an object: a file of the corpus or of a copy, or its bytes.

        Raises:
            BrokenError: it is not there, or it is not what was committed.
            RequestError: the storage fails.
        """
        if self.store.root is not None:
            return self._file(self.store.root / ref.name, ref)
        if self.disk is not None and (copy := self.disk.get(ref)) is not None:
            if _digest(copy) == ref.sha256:
                return copy
            self.disk.drop(ref)
        for _ in range(2):  # the way from a bucket may have spoilt it
            try:
                data = self.store.get_buffer(ref.name)
            except FileNotFoundError:
                raise BrokenError(f"{ref.name} is not there") from None
            except (OSError, BaseError) as error:
                raise RequestError(f"{ref.name} cannot be read: {error}") from error
            if (len(data), hashlib.sha256(data).hexdigest()) == (ref.size, ref.sha256):
                if self.disk is None:
                    return data
                self.disk.put(ref, data)
                return self.disk.get(ref) or data
        raise _damaged(ref, len(data))

    def _file(self, path: Path, ref: ObjectRef) -> FileIO:
        """Open a file of the corpus for reading."""
        try:
            file = path.open("rb", buffering=0)
            size = os.fstat(file.fileno()).st_size
            if size != ref.size or (ref.name not in self._checked and _digest(file) != ref.sha256):
                raise _damaged(ref, size)
        except FileNotFoundError:
            raise BrokenError(f"{ref.name} is not there") from None
        except OSError as error:
            raise RequestError(f"{ref.name} cannot be read: {error}") from error
        self._checked.add(ref.name)
        return file


def read_scattered(reader: ShardReader, wanted: Sequence[tuple[Commit, int]]) -> list[Field | BrokenError]:
    """Read single rows, each named by its shard's commit and its number, or say why one cannot be read.

    For rows that lie scattered over many shards, which are not read whole for them.

    Raises:
        RequestError: the storage fails.
    """
    with ThreadPoolExecutor(16) as pool:
        commits = {commit.object.name: commit for commit, _ in wanted}
        shards = {name: pool.submit(reader.open_ranges, commit) for name, commit in commits.items()}

        def read(commit: Commit, row: int) -> Field | BrokenError:
            try:
                return shards[commit.object.name].result().field(row)
            except BrokenError as error:
                return error

        return list(pool.map(lambda one: read(*one), wanted))


def _table(commit: Commit, sidecar: FileIO | memoryview) -> pa.Table:
    source = pa.BufferReader(sidecar) if isinstance(sidecar, memoryview) else sidecar
    try:
        file = open_table(source, commit.counts.get("in", -1))
        return file.read(["status", "offset", "size"], use_threads=False)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise BrokenError(f"{commit.sidecar.name} is no sidecar: {error}") from None


def _digest(file: FileIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(ref: ObjectRef, size: int) -> BrokenError:
    return BrokenError(
        f"{ref.name} is damaged: it has {size} bytes, the commit says {ref.size}"
        if size != ref.size
        else f"{ref.name} is damaged: its SHA-256 is not the commit's"
    )
