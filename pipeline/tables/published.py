"""Publish a cached table, and find it again."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import ObjectRef, Record
from microdit.pipeline.corpus.shard_files import sha256_file


class Table(Record):
    """The record of a published table: its object, and its number of rows."""

    object: ObjectRef
    rows: int


T = TypeVar("T", bound=Table)


def publish(corpus: Corpus, base: str, write: Callable[[Path], int], record: Callable[[ObjectRef, int], T]) -> T:
    """Publish the table `base`: its object first, then `<base>.json`, which names it. The first writer wins.

    Args:
        write: writes the object at a path; returns its number of rows.
        record: builds the record from the object and its number of rows.
    """
    name = f"{base}.{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(4).hex()}.parquet"
    with corpus.store.scratch(name) as path:
        rows = write(path)
        data = ObjectRef(name=name, size=path.stat().st_size, sha256=sha256_file(path))
        corpus.store.publish({name: path})
    table = record(data, rows)
    try:
        corpus.store.create(f"{base}.json", table.to_bytes())
    except FileExistsError:  # another writer was faster, or the record is damaged
        if winner := cached(corpus, base, type(table)):
            corpus.store.delete([name])
            return winner
        corpus.store.delete([f"{base}.json"])
        corpus.store.create(f"{base}.json", table.to_bytes())
    return table


def cached(corpus: Corpus, base: str, kind: type[T]) -> T | None:
    """Read the record of a published table; None if there is none, or its object is gone."""
    try:
        table = kind.parse(corpus.store.get(f"{base}.json"))
    except (FileNotFoundError, ValueError):
        return None
    return table if table.object.name.startswith(f"{base}.") and corpus.store.exists(table.object.name) else None
