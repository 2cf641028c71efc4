"""Captions: the one that came with the image, or one from a table. Exactly one per sample and column."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config import BuildConfig, CaptionsColumn, OpenmojiSource
from pipeline.corpus import Commit, Corpus, ShardRef
from pipeline.errors import RequestError
from pipeline.stages import IMAGES, ColumnSpec, attempts, fail_upstream, latest

SCALARS = {"caption": "string", "tokens": "int32"}


class Captions:
    """`captions/<name>`: captions and their number of words. A sample without one fails with `no_caption`.

    A join table is held in memory as a whole, once per process.
    """

    device = "cpu"

    def __init__(self, name: str, options: CaptionsColumn, config: BuildConfig):
        self.name, self.by = name, options.by
        stage: dict[str, Any] = {"stage": "captions", "version": 1, "from": "source"}
        self._table: Path | None = None
        if options.join is not None:
            self._table = _table_path(name, options.join, config)
            stage |= {"from": "table", "by": self.by, "table": _sha256(self._table, name)}
        self.columns = {name: ColumnSpec(stage, SCALARS, (IMAGES,))}

    def load(self) -> None:
        pass

    def run(self, corpus: Corpus, ref: ShardRef, columns: Sequence[str]) -> list[Commit]:
        images = latest(corpus, IMAGES, ref)
        table = None if self._table is None else read_captions(self._table, self.by)
        with ExitStack() as stack:
            made = attempts(stack, corpus, ref, columns, [images])
            lines = corpus.sidecar(images).select(["row", "key", "status", "reason", "detail", "origin", "caption"])
            for line in lines.to_pylist():
                row, key = line["row"], line["key"]
                if line["status"] != "ok":
                    fail_upstream(made, line, IMAGES)
                    continue
                caption = line["caption"] if table is None else table.get(line[self.by])
                for attempt in made.values():
                    if caption and caption.split():
                        attempt.add(row, key, caption=caption, tokens=len(caption.split()))
                    else:
                        where = "no caption came with it" if table is None else f"the table has none for its {self.by}"
                        attempt.fail(row, key, "no_caption", where)
            return [attempt.commit() for attempt in made.values()]


@lru_cache(maxsize=4)
def read_captions(path: Path, by: str) -> dict[str, str]:
    """A caption table as {origin or key: caption}; of a name given twice the first one stays.

    Raises:
        RequestError: it cannot be read, or has not the columns.
    """
    names = ("key",) if by == "key" else ("url", "origin")
    captions: dict[str, str] = {}
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                name = next((n for n in names if n in file.schema_arrow.names), None)
                if name is None or "caption" not in file.schema_arrow.names:
                    raise RequestError(_wrong_columns(path, names, file.schema_arrow.names))
                for batch in file.iter_batches(columns=[name, "caption"]):
                    for where, caption in zip(*(batch.column(i).to_pylist() for i in (0, 1)), strict=True):
                        captions.setdefault(where, caption)
            return captions
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise RequestError(f"caption table {path}, line {number}: no JSON ({error})") from None
                name = next((n for n in names if isinstance(entry, dict) and n in entry), None)
                if name is None or "caption" not in entry:
                    raise RequestError(f"{_wrong_columns(path, names, entry)} in line {number}")
                captions.setdefault(entry[name], entry["caption"])
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"caption table {path}: it cannot be read: {error}") from error
    return captions


def _wrong_columns(path: Path, names: Sequence[str], found: Any) -> str:
    return f"caption table {path}: expected the columns {' or '.join(names)}, and caption; found {list(found)[:12]}"


def _table_path(column: str, join: str, config: BuildConfig) -> Path:
    if join != "openmoji":
        return Path(join).expanduser().absolute()
    from pipeline.sources.openmoji import Openmoji

    for name, options in config.sources.items():
        if isinstance(options, OpenmojiSource):
            return Openmoji(name, options).captions_table()
    raise RequestError(
        f"columns.{column}.join = 'openmoji': there is no source with the adapter openmoji; give the path of a table"
    )


@lru_cache(maxsize=16)
def _sha256(path: Path, column: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(
            f"columns.{column}.join = {str(path)!r}: it cannot be read ({error.strerror}); "
            "expected a .jsonl or .parquet file"
        ) from None
