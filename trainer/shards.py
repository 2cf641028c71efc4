"""Shards of columns in memory, as they are stored, and what of them is broken.

A shard is one buffer; a row is decoded when it is used, and a `.npy` is then a view into the buffer. What cannot be
read is named, and noted for the checkpoint: missing, cut, other bytes than the commit says, or a row that no array is.
A bucket that fails in passing is no damage: the store tries again, and when it gives up the run ends.
"""

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.exceptions import BaseError

from pipeline.corpus import Commit, Corpus, ObjectRef
from pipeline.errors import RequestError
from pipeline.quantise import Quantised
from pipeline.shards import array_view
from trainer.disk_cache import DiskCache
from trainer.samples import SampleIndex, Where

WHOLE = -1  # in place of a row


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
    """One shard of one column: the object's bytes, and where in them each row lies."""

    def __init__(self, data: memoryview, sidecar: pa.Table):
        ok = pc.equal(sidecar["status"], "ok").to_numpy()
        self._data = data
        self._size = np.where(ok, pc.fill_null(sidecar["size"], 0).to_numpy(), -1)
        self._offset = pc.fill_null(sidecar["offset"], 0).to_numpy()

    def field(self, row: int) -> np.ndarray | Quantised:
        """What a row holds: a view of its `.npy`, or the parts of quantised text.

        Raises:
            ValueError: there is no such row, or it cannot be decoded.
        """
        if not 0 <= row < len(self._size) or self._size[row] < 0:
            raise ValueError("its sidecar has no such row")
        start = int(self._offset[row])
        return array_view(self._data[start : start + int(self._size[row])])


class ShardCache:
    """Shards of columns, read in threads and kept up to `max_bytes`, the last used ones; `disk` has copies."""

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
        self.bytes = self.reads = 0
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="shards")
        self._shards: OrderedDict[tuple[str, Where], Future[Shard]] = OrderedDict()
        self._sizes: dict[tuple[str, Where], int] = {}

    def request(self, column: str, where: Where) -> Future[Shard]:
        """Begin to read a shard, if it is not here."""
        key = (column, where)
        if key not in self._shards:
            self.reads += 1
            self._sizes[key] = self.columns[column][where].size
            self.bytes += self._sizes[key]
            self._shards[key] = self._pool.submit(self._read, column, where)
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
        try:
            return shard.field(row)
        except ValueError as error:
            name = self.columns[column][where].object.name
            self.broken.add(column, where, row, why := f"{name}: {error}")
            raise BrokenError(why) from None

    def trim(self) -> None:
        """Forget what was used longest ago until the rest fits; the last one stays."""
        while self.bytes > self.max_bytes and len(self._shards) > 1:
            key, future = self._shards.popitem(last=False)
            future.cancel()
            self.bytes -= self._sizes.pop(key)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read(self, column: str, where: Where) -> Shard:
        commit = self.columns[column][where]
        sidecar = self._object(commit.sidecar)
        try:
            table = pq.ParquetFile(pa.BufferReader(sidecar)).read(["status", "offset", "size"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise BrokenError(f"{commit.sidecar.name} is no sidecar: {error}") from None
        return Shard(self._object(commit.object), table)

    def _object(self, ref: ObjectRef) -> memoryview:
        """An object, from this machine's copy or from the corpus.

        Raises:
            BrokenError: it is not there, or it is not what was committed.
            RequestError: the storage fails.
        """
        if self.disk is not None and (copy := self.disk.get(ref)) is not None:
            if _is(ref, view := memoryview(copy)):
                return view
            self.disk.drop(ref)
        for _ in range(2):  # the way from a bucket may have spoilt it
            try:
                data = self.corpus.store.get_buffer(ref.name)
            except FileNotFoundError:
                raise BrokenError(f"{ref.name} is not there") from None
            except (OSError, BaseError) as error:
                raise RequestError(f"{ref.name} cannot be read: {error}") from error
            if _is(ref, data):
                if self.disk is not None:
                    self.disk.put(ref, data)
                return data
        raise BrokenError(
            f"{ref.name} is damaged: it has {len(data)} bytes, the commit says {ref.size}"
            if len(data) != ref.size
            else f"{ref.name} is damaged: its SHA-256 is not the commit's"
        )


def _is(ref: ObjectRef, data: memoryview) -> bool:
    return len(data) == ref.size and hashlib.sha256(data).hexdigest() == ref.sha256
