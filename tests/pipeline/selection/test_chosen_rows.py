"""Selections of millions of rows: in little memory, the same bytes as ever."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.selection import chosen_rows
from microdit.pipeline.selection.chosen_rows import PART, SELECTION, ChosenRows, rows_by_shard

NAME = st.sampled_from(["a", "b", "a-0", "b-0", "ä"])
ROWS = st.dictionaries(st.tuples(NAME, NAME, st.integers(0, 2**31 - 1)), st.floats(0.125, 8, width=32), min_size=1)


def _table(rows: dict[tuple[str, str, int], float], order: list[tuple[str, str, int]]) -> pa.Table:
    columns = [list(column) for column in zip(*((*row, rows[row]) for row in order), strict=True)]
    return pa.table(columns, schema=SELECTION)


@settings(max_examples=100, deadline=None, print_blob=True)
@given(ROWS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_rows_are_sorted_and_found(rows: dict[tuple[str, str, int], float], rng: object, size: int) -> None:
    order = list(rows)
    rng.shuffle(order)  # type: ignore[attr-defined]
    table = pa.Table.from_batches(_table(rows, order).to_batches(size))
    chosen, wanted = ChosenRows.of(table), _table(rows, sorted(rows))
    assert pa.concat_tables(chosen.parts()).equals(wanted) and not chosen.double
    others = _table(rows | {("a", "c", 1): 1.0}, [("a", "c", 1), *order]).to_batches(size)
    assert chosen.all_in(others) and not chosen.all_in(
        _table(rows, order[1:] or [order[0]][:0]).to_batches(size) if len(order) > 1 else []
    )
    assert ChosenRows.of(pa.concat_tables([table, table.slice(0, 1)])).double
    by_shard = rows_by_shard(pa.Table.from_batches([batch]) for batch in wanted.to_batches(size))
    again = [(*shard, row, weight) for shard, both in by_shard.items() for row, weight in zip(*both, strict=True)]
    assert again == [tuple(line.values()) for line in wanted.to_pylist()]


def test_a_file_in_parts_has_the_bytes_of_one_that_is_written_at_once() -> None:
    count = PART + 5000
    number = np.arange(count)
    table = pa.table(
        [
            pa.repeat("source", count),
            pa.array([f"source-{n:06d}" for n in range(count // 1000 + 1)]).take(pa.array(number // 1000)),
            pa.array((number % 1000).astype(np.int32)),
            pa.array(np.random.default_rng(0).choice([1, 0.5, 1 / 3], count).astype(np.float32)),
        ],
        schema=SELECTION.with_metadata({"microdit": "{}"}),
    )
    whole, parts = io.BytesIO(), io.BytesIO()
    pq.write_table(table, whole, compression="zstd")
    with pq.ParquetWriter(parts, table.schema, compression="zstd") as writer:
        for part in ChosenRows.of(table).parts():
            writer.write_table(part, row_group_size=chosen_rows.PART)
    assert parts.getvalue() == whole.getvalue()
