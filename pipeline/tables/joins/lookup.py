"""Look up rows of a join table by key."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.storage.store import Store
from microdit.pipeline.tables.joins.spec import JoinSpec, JoinTable

KEPT = 4  # row groups in memory of a worker, for each table


class Joined:
    """A table made by `build`. Picklable: workers open it at the first look-up."""

    def __init__(self, store: Store, spec: JoinSpec):
        self._store, self._base = store, spec.base
        self._groups: OrderedDict[int, tuple[list[str], pa.RecordBatch]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "_base": self._base, "_groups": OrderedDict()}

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the fields of a key; None if the key is absent."""
        number = bisect_left(self._table.last, key)
        if number == len(self._table.last):
            return None
        keys, rows = self._group(number)
        row = bisect_left(keys, key)
        if row == len(keys) or keys[row] != key:
            return None
        return dict(zip(self._table.fields, rows.slice(row, 1).to_pylist()[0].values(), strict=True))

    def get_many(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the fields of the keys that the table has, given in any order; each row group is read once at most."""
        return {key: fields for key in sorted(set(keys)) if (fields := self.get(key)) is not None}

    @cached_property
    def _table(self) -> JoinTable:
        return JoinTable.parse(self._store.get(f"{self._base}.json"))

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._store.open(self._table.object.name))

    def _group(self, number: int) -> tuple[list[str], pa.RecordBatch]:
        """Return the keys and the fields of a row group; the latest few are cached."""
        if number not in self._groups:
            table = self._file.read_row_group(number).combine_chunks()
            keys = table["key"].to_pylist()
            self._groups[number] = keys, table.drop_columns(["key"]).to_batches()[0]
            while len(self._groups) > KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(number)
        return self._groups[number]
