"""Shards of columns as they are stored, on this machine's disk or in memory, for reading row by row.

A row is read and decoded when it is used: from the file of a corpus in a folder or of a copy on the disk, which the
system keeps in memory as it can; else from the object in memory.
"""

import resource
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.disk_cache import DiskCache
from microdit.pipeline.corpus.open_shard import OpenShard, ShardReader
from microdit.pipeline.corpus.quantised import Field
from microdit.pipeline.corpus.records import Commit

ShardId = tuple[str, str]  # source, shard
MOST_FILES = 16_384  # open at once


class ShardCache:
    """Shards of columns, read in threads; the last used ones are kept, up to `max_bytes` in memory.

    disk: keeps copies of what comes from a bucket.
    """

    def __init__(
        self,
        corpus: Corpus,
        columns: Mapping[str, Mapping[ShardId, Commit]],
        max_bytes: int,
        disk: DiskCache | None = None,
    ):
        self.corpus, self.columns, self.max_bytes = corpus, columns, max_bytes
        self.reader = ShardReader(corpus.store, disk)
        self.reads = 0
        # a bucket is waited for, a disk hardly
        self._pool = ThreadPoolExecutor(8 if corpus.store.root is None else 4, thread_name_prefix="shards")
        self._shards: OrderedDict[tuple[str, ShardId], Future[OpenShard]] = OrderedDict()
        self._most_files = _files_allowed() // 2

    def request(self, column: str, shard: ShardId) -> Future[OpenShard]:
        """Begin to read a shard, if it is not here."""
        key = (column, shard)
        if key not in self._shards:
            self.reads += 1
            commit = self.columns[column][shard]
            # at once, so that a bucket is waited for once; whoever reads the object finds the sidecar begun before it
            sidecar = self._pool.submit(self.reader.read, commit.sidecar)
            self._shards[key] = self._pool.submit(self.reader.open, commit, sidecar)
        self._shards.move_to_end(key)
        return self._shards[key]

    def field(self, column: str, shard: ShardId, row: int) -> Field:
        """Read what a row of a column holds. Raises as `OpenShard.field` and `ShardReader.read`."""
        return self.request(column, shard).result().field(row)

    def trim(self) -> None:
        """Forget what was used longest ago until the rest fits; the last one stays."""
        memory = sum(map(self._memory, self._shards))
        while (memory > self.max_bytes or len(self._shards) > self._most_files) and len(self._shards) > 1:
            key = next(iter(self._shards))
            memory -= self._memory(key)
            self._shards.pop(key).cancel()

    def _memory(self, key: tuple[str, ShardId]) -> int:
        future = self._shards[key]
        if not future.done():  # a bucket's, unless the disk takes it
            in_memory = self.corpus.store.root is None and self.reader.disk is None
            return self.columns[key[0]][key[1]].size if in_memory else 0
        return 0 if future.exception() else future.result().memory

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _files_allowed() -> int:
    """Ask for as many open files as this process may have, and return their number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft
