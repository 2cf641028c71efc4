"""Read the first rows of a table beside pictures, and find out how it is joined to them."""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from microdit.pipeline.files.archives import stem
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.files.unpacked import unpacked
from microdit.pipeline.inspect.columns import by_name, caption_column

ROWS = 200
MAX_LINE, MAX_LIST = 64 << 20, 512 << 20


def rows_of_table(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .jsonl, .json, .csv, .tsv or .parquet file, as far as they can be read."""
    if name.endswith(".parquet"):
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(ROWS):
                yield from batch.to_pylist()
    elif name.endswith((".csv", ".tsv")):
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if name.endswith(".tsv") else ",")
    else:
        with unpacked(path) as lines:
            if lines.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                rows = json.loads(lines.read(MAX_LIST))
                yield from (row for row in rows if isinstance(row, dict))
                return
            while line := lines.readline(MAX_LINE):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row


def join_of(tables: Sequence[RemoteFile], names: Sequence[str], scratch: Path) -> dict[str, Any] | None:
    """Return the options that join a table with the pictures' captions; None if no table names the pictures.

    Args:
        names: of a few pictures, as they are called in their archive or below their folder.
    """
    keys = {"origin": set(names), "key": {stem(name)[0] for name in names}}
    for table in tables:
        with local_copy(table, scratch) as path:
            try:
                columns = by_name(list(islice(rows_of_table(path, table.name), ROWS)))
            except (ValueError, OSError):
                continue
        for by, known in keys.items():
            for column, values in columns.items():
                if known & {value for value in values if isinstance(value, str)}:
                    others = {name: each for name, each in columns.items() if name != column}
                    if caption := caption_column(others):
                        join = {"file": table.url, "key": column, "by": by, "rows_of": "all"}
                        return {"caption": "joined.text", "joins": [{**join, "fields": {"text": caption}}]}
    return None
