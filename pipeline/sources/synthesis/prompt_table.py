"""Write prepared prompts: a Parquet file with the hash of what is in it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GROUP = 4096
"""Prompts of a row group, which one read decodes."""
SCHEMA = pa.schema([("row", pa.int64()), ("text", pa.string()), ("fields", pa.string())])
"""The place in the source, the prompt, and its fields as a JSON object."""


def write_prompts(
    path: Path, batches: Iterable[pa.RecordBatch], left_out: Mapping[str, int], examples: Sequence[str]
) -> int:
    """Write a prepared file of batches of `SCHEMA`; `left_out` and `examples` are read when all batches are written.

    Returns:
        the number of prompts.
    """
    digest, rows = hashlib.sha256(b"prompts 1"), 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for batch in _even(batches):
            rows += len(batch)
            digest.update(_bytes(batch))
            writer.write_batch(batch, row_group_size=GROUP)
        writer.add_key_value_metadata(
            {"identity": digest.hexdigest(), "left_out": json.dumps(left_out), "examples": json.dumps(examples)}
        )
    return rows


def _even(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Cut batches into ones of `GROUP` rows; the last may have fewer."""
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if count >= GROUP:
            table = pa.Table.from_batches(waiting, SCHEMA)
            whole = count - count % GROUP
            yield from (_whole(table.slice(at, GROUP)) for at in range(0, whole, GROUP))
            rest = table.slice(whole)
            waiting, count = ([_whole(rest)] if len(rest) else []), len(rest)
    if count:
        yield _whole(pa.Table.from_batches(waiting, SCHEMA))


def _whole(table: pa.Table) -> pa.RecordBatch:
    return table.combine_chunks().to_batches()[0]


def _bytes(batch: pa.RecordBatch) -> bytes:
    """Write the rows of a batch as bytes that no other rows have."""
    parts = [np.asarray(batch["row"], "<i8").tobytes()]
    for name in ("text", "fields"):
        values = [value.encode() for value in batch[name].to_pylist()]
        parts += [np.array([len(value) for value in values], "<i8").tobytes(), *values]
    return b"".join(parts)
