"""Shards of columns as they are stored, on this machine's disk or in memory, and what of them is broken.

A row is read and decoded when it is used: from the file of a corpus in a folder or of a copy on the disk, which the
system keeps in memory as it can; else from the object in memory. What cannot be read is named, and noted for the
checkpoint: missing, cut, other bytes than the commit says, or a row that no array is. A bucket that fails in passing is
no damage: the store tries again, and when it gives up the run ends.
"""

import hashlib
import os
import resource
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.arrays import array_view
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.quantised import Quantised
from microdit.pipeline.corpus.records import Commit, ObjectRef
from microdit.trainer.data.disk_cache import DiskCache
from microdit.trainer.data.sample_index import SampleIndex, Where

WHOLE = -1  # in place of a row
MOST_FILES = 16_384  # open at once


class BrokenError(Exception):
    """A sample, or its whole shard, cannot be read, and never will be."""


class Broken:
    """What of which column is broken: (column, source, shard, row or `WHOLE`) -> why."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str, int], str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def why(self, column: str, where: Where, row: int = WHOLE) -> str | None:
        if not self._found:
            return None
        return self._found.get((column, *where, WHOLE)) or self._found.get((column, *where, row))

    def add(self, column: str, where: Where, row: int, why: str) -> None:
        """Note something, and tell it once."""
        with self._lock:
            if self.why(column, where, row) is None:
                self._found[column, *where, row] = why
                what = f"column {column}, shard {where[1]}" + ("" if row == WHOLE else f", row {row}")
                print(f"broken, and replaced: {what}: {why}", file=sys.stderr, flush=True)

    def listed(self) -> list[list[Any]]:
        """For a checkpoint: [column, source, shard, row, why], sorted."""
        with self._lock:
            return sorted([*key, why] for key, why in self._found.items())

    def restore(self, listed: Iterable[Iterable[Any]]) -> None:
        """Add what another process, or an earlier run, has found: it stays replaced even if it was mended since."""
        with self._lock:
            for column, source, shard, row, why in listed:
                self._found.setdefault((column, source, shard, row), why)

    def samples(self, index: SampleIndex, columns: Iterable[str]) -> int:
        """How many samples of an index are broken in one of these columns."""
        numbers = {where: number for number, where in enumerate(index.shards)}
        wanted, hit = set(columns), np.zeros(len(index), dtype=bool)
        for column, source, shard, row, _ in self.listed():
            number = numbers.get((source, shard))
            if column in wanted and number is not None:
                own = slice(*np.searchsorted(index.shard, [number, number + 1]))
                hit[own] |= True if row == WHOLE else index.row[own] == row
        return int(hit.sum())


class Shard:
    """One shard of one column: its object, a file or the bytes, and where in it each row lies."""

    def __init__(self, data: FileIO | memoryview, sidecar: pa.Table):
        ok = pc.equal(sidecar["status"], "ok").to_numpy()
        self._data = data
        self._size = np.where(ok, pc.fill_null(sidecar["size"], 0).to_numpy(), -1)
        self._offset = pc.fill_null(sidecar["offset"], 0).to_numpy()

    @property
    def memory(self) -> int:
        """Bytes of it that are held in memory."""
        return len(self._data) if isinstance(self._data, memoryview) else 0

    def field(self, row: int) -> np.ndarray | Quantised:
        """What a row holds: a view of its `.npy`, or the parts of quantised text.

        Raises:
            ValueError: there is no such row, or it cannot be decoded.
            OSError: the disk fails.
        """
        if not 0 <= row < len(self._size) or self._size[row] < 0:
            raise ValueError("its sidecar has no such row")
        start, size = int(self._offset[row]), int(self._size[row])
        if isinstance(self._data, memoryview):
            return array_view(self._data[start : start + size])
        return array_view(memoryview(os.pread(self._data.fileno(), size, start)))


class ShardCache:
    """Shards of columns, read in threads; the last used ones are kept, up to `max_bytes` in memory.

    disk: keeps copies of what came from a bucket. An object is checked against its commit when it is read the first
    time, and each time that it comes from a bucket or from a copy that another process may have made.
    """

    def __init__(
        self,
        corpus: Corpus,
        columns: Mapping[str, Mapping[Where, Commit]],
        max_bytes: int,
        disk: DiskCache | None = None,
    ):
        self.corpus, self.columns, self.max_bytes = corpus, columns, max_bytes
        self.disk = disk if corpus.store.root is None else None  # a folder is read where it is
        self.broken = Broken()
        self.reads = 0
        # a bucket is waited for, a disk hardly
        self._pool = ThreadPoolExecutor(8 if corpus.store.root is None else 4, thread_name_prefix="shards")
        self._shards: OrderedDict[tuple[str, Where], Future[Shard]] = OrderedDict()
        self._checked: set[str] = set()
        self._most_files = _files_allowed() // 2

    def request(self, column: str, where: Where) -> Future[Shard]:
        """Begin to read a shard, if it is not here."""
        key = (column, where)
        if key not in self._shards:
            self.reads += 1
            commit = self.columns[column][where]
            # at once, so that a bucket is waited for once; whoever reads the object finds the sidecar begun before it
            sidecar = self._pool.submit(self._object, commit.sidecar)
            self._shards[key] = self._pool.submit(self._read, commit, sidecar)
        self._shards.move_to_end(key)
        return self._shards[key]

    def field(self, column: str, where: Where, row: int) -> np.ndarray | Quantised:
        """What a row of a column holds (`Shard.field`).

        Raises:
            BrokenError: it cannot be read; this is noted in `broken`.
            RequestError: the storage fails.
        """
        if why := self.broken.why(column, where, row):
            raise BrokenError(why)
        try:
            shard = self.request(column, where).result()
        except BrokenError as error:
            self.broken.add(column, where, WHOLE, str(error))
            raise
        name = self.columns[column][where].object.name
        try:
            return shard.field(row)
        except OSError as error:
            raise RequestError(f"{name} cannot be read: {error}") from error
        except ValueError as error:
            self.broken.add(column, where, row, why := f"{name}: {error}")
            raise BrokenError(why) from None

    def trim(self) -> None:
        """Forget what was used longest ago until the rest fits; the last one stays."""
        memory = sum(map(self._memory, self._shards))
        while (memory > self.max_bytes or len(self._shards) > self._most_files) and len(self._shards) > 1:
            key = next(iter(self._shards))
            memory -= self._memory(key)
            self._shards.pop(key).cancel()

    def _memory(self, key: tuple[str, Where]) -> int:
        future = self._shards[key]
        if not future.done():  # a bucket's, unless the disk takes it
            return 0 if self.in_files else self.columns[key[0]][key[1]].size
        return 0 if future.exception() else future.result().memory

    @property
    def in_files(self) -> bool:
        """Whether shards are read from files, and memory is no matter."""
        return self.corpus.store.root is not None or self.disk is not None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read(self, commit: Commit, sidecar: Future[FileIO | memoryview]) -> Shard:
        data = self._object(commit.object)
        source = _source(sidecar.result())
        try:
            table = pq.ParquetFile(source).read(["status", "offset", "size"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise BrokenError(f"{commit.sidecar.name} is no sidecar: {error}") from None
        return Shard(data, table)

    def _object(self, ref: ObjectRef) -> FileIO | memoryview:
        """An object: a file of the corpus or of a copy, or its bytes.

        Raises:
            BrokenError: it is not there, or it is not what was committed.
            RequestError: the storage fails.
        """
        if (root := self.corpus.store.root) is not None:
            return self._file(root / ref.name, ref)
        if self.disk is not None and (copy := self.disk.get(ref)) is not None:
            if _digest(copy) == ref.sha256:
                return copy
            self.disk.drop(ref)
        for _ in range(2):  # the way from a bucket may have spoilt it
            try:
                data = self.corpus.store.get_buffer(ref.name)
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
        """A file of the corpus, open for reading."""
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


def _source(data: FileIO | memoryview) -> FileIO | pa.BufferReader:
    return pa.BufferReader(data) if isinstance(data, memoryview) else data


def _digest(file: FileIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(ref: ObjectRef, size: int) -> BrokenError:
    return BrokenError(
        f"{ref.name} is damaged: it has {size} bytes, the commit says {ref.size}"
        if size != ref.size
        else f"{ref.name} is damaged: its SHA-256 is not the commit's"
    )


def _files_allowed() -> int:
    """How many files this process may have open, after it has asked for as many as it may get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft
