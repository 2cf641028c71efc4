"""Captions: the one that came with the image, or one from a table. Exactly one per sample and column."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import BuildConfig, CaptionsColumn, OpenmojiSource
from pipeline.corpus import Commit, Corpus
from pipeline.errors import RequestError
from pipeline.stages import IMAGES, ColumnSpec, Task, attempts, commit_all, latest, read_lines, samples

SCALARS = {"caption": "string", "tokens": "int32"}
SURROGATES = re.compile("[\ud800-\udfff]")


class Captions:
    """`captions/<name>`: captions and their number of words. A sample without one fails with `no_caption`.

    One with lone surrogates (JSON can write them, UTF-8 cannot) fails with `not_text`. A join table is held in memory
    as a whole, once per process.
    """

    device = "cpu"

    def __init__(self, name: str, options: CaptionsColumn, config: BuildConfig):
        self.name, self.by = name, options.by
        self._field, self._fallback = options.field, options.fallback
        stage: dict[str, Any] = {"stage": "captions", "version": 1, "from": "source"}
        self._table: Path | None = None
        if options.field is not None:
            stage |= {"from": "field", "field": options.field, "fallback": options.fallback}
        if options.join is not None:
            self._table = _table_path(name, options.join, config)
            self._sha256 = _sha256(self._table, name)
            stage |= {"from": "table", "by": self.by, "table": self._sha256}
        self.columns = {name: ColumnSpec(stage, SCALARS, (IMAGES,))}

    def load(self) -> None:
        pass

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        images = latest(corpus, IMAGES, task.ref)
        table = None if self._table is None else read_captions(self._table, self.by, self._sha256)
        where = "no caption came with it" if table is None else f"the table has none for its {self.by}"
        if self._field is not None:
            where = f"no text came with it as {self._field!r}"
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [images])
            for row in samples(read_lines(corpus, images), made, task, IMAGES):
                caption = row.scalars["caption"] if table is None else table.get(row.scalars[self.by])
                if self._field is not None:
                    caption = field_text(row.scalars.get("fields"), self._field) or (caption if self._fallback else "")
                for attempt in made.values():
                    if not caption or not caption.split():
                        attempt.fail(row.row, row.key, "no_caption", where)
                    elif SURROGATES.search(caption):
                        attempt.fail(row.row, row.key, "not_text", "it has lone surrogates, which UTF-8 cannot write")
                    else:
                        attempt.add(row.row, row.key, caption=caption, tokens=len(caption.split()))
            return commit_all(made, task)


def field_text(fields: str | None, name: str) -> str:
    """A field of a sample's `fields` (a JSON object, or empty) if it is a text, else nothing."""
    found = json.loads(fields).get(name) if fields else None
    return found if isinstance(found, str) else ""


@lru_cache(maxsize=4)
def read_captions(path: Path, by: str, sha256: str) -> dict[str, str | None]:
    """A caption table as {origin or key: caption}; of a name given twice the first one stays.

    Raises:
        RequestError: it cannot be read, has not the columns, or is not the file with this hash.
    """
    names = ("key",) if by == "key" else ("url", "origin")
    captions: dict[str, str | None] = {}
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise RequestError(f"caption table {path}: it is not the one that the column was declared with")
        for place, entry in _parquet(path, names) if path.suffix == ".parquet" else _json_lines(path):
            name = next((n for n in names if n in entry), None)
            if name is None or "caption" not in entry:
                raise RequestError(f"caption table {path}{place}: {_wanted(names)}; found {list(entry)[:12]}")
            where, caption = entry[name], entry["caption"]
            if not isinstance(where, str) or not isinstance(caption, str | None):
                raise RequestError(f"caption table {path}{place}: {name} and caption must be strings; found {entry}")
            captions.setdefault(where, caption)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise RequestError(f"caption table {path}: it cannot be read: {error}") from error
    return captions


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"caption table {path}, line {number}: no JSON ({error})") from None
            if not isinstance(entry, dict):
                raise RequestError(f"caption table {path}, line {number}: expected a JSON object; found {line[:80]!r}")
            yield f", line {number}", entry


def _parquet(path: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with pq.ParquetFile(path) as file:
        found = file.schema_arrow.names
        if "caption" not in found or not set(names) & set(found):
            raise RequestError(f"caption table {path}: {_wanted(names)}; found {found[:12]}")
        for batch in file.iter_batches(columns=[name for name in (*names, "caption") if name in found]):
            for entry in batch.to_pylist():
                yield "", entry


def _wanted(names: Sequence[str]) -> str:
    return f"expected the columns {' or '.join(names)}, and caption"


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
