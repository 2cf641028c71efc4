"""Look up rows of a join table by key."""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from microdit.pipeline.corpus.shard_files import check_footer
from microdit.pipeline.storage.store import Store
from microdit.pipeline.tables.joins.spec import JoinSpec, JoinTable
from microdit.pipeline.tables.published import damage_of

KEPT = 4  # row groups in memory of a worker, for each table
AMBIGUOUS: dict[str, Any] = {}
"""The fields of a key that comes several times, with different values: none, as nobody knows whose each is."""


class Joined:
    """A table made by `build`. Picklable: workers open it at the first look-up."""

    def __init__(self, store: Store, spec: JoinSpec):
        self._store, self._base, self._first_counts = store, spec.base, spec.first_counts
        self._groups: OrderedDict[int, tuple[list[str], pa.RecordBatch]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("_store", "_base", "_first_counts")} | {"_groups": OrderedDict()}

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the fields of a key; None if the key is absent, `AMBIGUOUS` if its rows have different values."""
        found: list[Any] = []
        for number in range(bisect_left(self._table.last, key), len(self._table.last)):
            keys, rows = self._group(number)
            first, end = bisect_left(keys, key), bisect_right(keys, key)
            for row in rows.slice(first, end - first).to_pylist():
                values = list(row.values())
                if found and not self._first_counts and repr(values) != repr(found):  # as text, so that NaN is NaN
                    return AMBIGUOUS
                found = found or values
            if end < len(keys) or (found and self._first_counts):
                break
        return dict(zip(self._table.fields, found, strict=True)) if found else None

    def get_many(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the fields of the keys that the table has, given in any order; each row group is read once at most."""
        return {key: fields for key in sorted(set(keys)) if (fields := self.get(key)) is not None}

    @cached_property
    def _table(self) -> JoinTable:
        return JoinTable.parse(self._store.get(f"{self._base}.json"))

    @cached_property
    def _file(self) -> pq.ParquetFile:
        with damage_of(self._store.url, self._table):
            file = pq.ParquetFile(self._store.open(self._table.object.name))
            check_footer(file.metadata, self._table.rows, "its record")
            if file.metadata.num_row_groups != len(self._table.last):
                raise ValueError(f"it has {file.metadata.num_row_groups} row groups, expected {len(self._table.last)}")
            return file

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
