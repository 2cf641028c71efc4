"""Publish a cached table, and open it if it is there."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import ObjectRef, Record
from microdit.pipeline.corpus.shard_files import sha256_file


class Table(Record):
    """A published table: the object that holds it, and its number of rows."""

    object: ObjectRef
    rows: int


T = TypeVar("T", bound=Table)


def publish(corpus: Corpus, base: str, write: Callable[[Path], int], record: Callable[[ObjectRef, int], T]) -> T:
    """Publish the table `base`, unless somebody was faster: its object first, then `<base>.json`, which names it.

    Args:
        write: writes the object at a path; gives its number of rows.
        record: what `<base>.json` says.
    """
    made = f"{base}.{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.urandom(4).hex()}.parquet"
    with corpus.store.scratch(made) as path:
        rows = write(path)
        data = ObjectRef(name=made, size=path.stat().st_size, sha256=sha256_file(path))
        corpus.store.publish({made: path})
    table = record(data, rows)
    try:
        corpus.store.create(f"{base}.json", table.to_bytes())
    except FileExistsError:  # somebody was faster, or what is there is damaged
        if faster := cached(corpus, base, type(table)):
            corpus.store.delete([made])
            return faster
        corpus.store.delete([f"{base}.json"])
        corpus.store.create(f"{base}.json", table.to_bytes())
    return table


def cached(corpus: Corpus, base: str, kind: type[T]) -> T | None:
    """The record of a published table; None if there is none, or its object is gone."""
    try:
        table = kind.parse(corpus.store.get(f"{base}.json"))
    except (FileNotFoundError, ValueError):
        return None
    return table if table.object.name.startswith(f"{base}.") and corpus.store.exists(table.object.name) else None
