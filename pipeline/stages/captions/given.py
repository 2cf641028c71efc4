"""Captions that exist already: they came with the image, in a field of its source, or in a table."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.content.alt_text import clean_caption
from microdit.pipeline.content.caption_faults import SURROGATES
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.redeclare import DECLARATION
from microdit.pipeline.corpus.rows import Row, latest, read_lines
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.stages.captions.asking import SCALARS, caption_output
from microdit.pipeline.stages.captions.correction import Correction, is_outdated
from microdit.pipeline.stages.row_stage import compute_rows
from microdit.pipeline.stages.rows import RowFailure, Scalars, open_shard
from microdit.pipeline.stages.stage import ColumnSpec, Task
from microdit.pipeline.tables.joins.lookup import AMBIGUOUS, Joined
from microdit.pipeline.tables.joins.spec import JoinSpec

FILE_NUMBER = re.compile(r"^\d{6,}-")
READERS = {".parquet": "parquet", ".jsonl": "jsonl", ".gz": "jsonl", ".json": "jsonl"}
TableRows = Mapping[str, Mapping[str, Any]]
"""Rows of a joined table, by the key or origin of a sample."""


class GivenCaptions:
    """`captions/<name>`: captions and their number of words. A sample without one fails with `no_caption`.

    A caption with lone surrogates (JSON can write them, UTF-8 cannot) fails with `not_text`.

    Args:
        table: the table of `join`, which `declare` sorts into the corpus before the first shard.
    """

    device = None

    def __init__(self, name: str, options: CaptionsColumn, table: JoinSpec | None = None):
        self.name, self._options, self.table = name, options, table
        self._joined: Joined | None = None
        self.corrections: dict[str, Correction] = {}
        """By source; `correct` finds them."""
        self.columns = {name: ColumnSpec(self._made_by(), SCALARS, (IMAGES,))}

    def _made_by(self) -> dict[str, Any]:
        options, table = self._options, self.table
        stage: dict[str, Any] = {"stage": "captions", "version": 2, "from": "source"}
        if options.field is not None:
            stage |= {"from": "field", "field": options.field, "fallback": options.fallback}
        if table is not None:
            stage |= {"from": "table", "by": options.by, "table": table.listing.identity}
            stage |= {"key": table.key, "column": options.column}
        if options.clean is not None:
            stage |= {"clean": options.clean}
        if options.kind is not None:
            stage |= {"kind": options.kind}
        return stage

    def keep_to_known_table(self, corpus: Corpus) -> None:
        """Take the table from the revision of its hub repository that the column was declared with.

        Raises:
            RequestError: the hub does not have it any more.
        """
        if self.table is None or self.name not in corpus.columns():
            return
        declared, now = corpus.column(self.name).made_by.get("table"), self.table.listing.identity
        if isinstance(declared, dict) and "repo" in declared and declared["repo"] == now.get("repo"):
            revisions = {declared["repo"]: declared["revision"]}
            self.table = join_spec(self.name, self._options, str(self._options.join), revisions)
            self.columns = {self.name: ColumnSpec(self._made_by(), SCALARS, (IMAGES,))}

    def load(self) -> None:
        pass

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        images = latest(corpus, IMAGES, task.ref)
        if self.table is not None and self._joined is None:
            self._joined = Joined(corpus.store, self.table)
        rows = list(read_lines(corpus, images))
        timings: dict[str, float] = {}
        correction = self.corrections.get(task.ref.source)
        if correction is not None and is_outdated(images, correction.number):
            rows = self._corrected(corpus, task, rows, correction)
            timings[DECLARATION] = correction.number
        table: TableRows = {}
        if self._joined is not None:  # all at once: a shard is not in the table's order
            keys = [row.scalars[self._options.by] for row in rows if row.ok]
            table = self._joined.get_many([*keys, *map(_own_name, keys)])
        with open_shard(corpus, task, images) as shard:
            return compute_rows(shard, partial(self._scalars, table), rows, timings)

    def _corrected(self, corpus: Corpus, task: Task, rows: list[Row], correction: Correction) -> list[Row]:
        """Put the texts that the source has by its corrected options in place of those that came with the images."""
        texts = correction.texts(corpus, task.ref.unit, [row.scalars["origin"] for row in rows if row.ok])
        corrected = []
        for row in rows:
            text = texts.get(row.scalars["origin"] or "")
            new = {"caption": "", "fields": "", "ambiguous": text is AMBIGUOUS, **(text or {})}
            corrected.append(replace(row, scalars={**row.scalars, **new}))
        return corrected

    def _scalars(self, table: TableRows, row: Row) -> Scalars:
        caption, missing = self._caption(row, table)
        if self._options.clean is not None:
            caption = clean_caption(caption)
        if not caption.split():
            raise self._why_none(row) or RowFailure("no_caption", missing)
        if SURROGATES.search(caption):
            raise RowFailure("not_text", "it has lone surrogates, which UTF-8 cannot write")
        return caption_output(caption).scalars

    def _why_none(self, row: Row) -> RowFailure | None:
        """Return the failure that the source noted, of a text that it could not take; None if it noted none."""
        if self.table is not None:
            return None
        if row.scalars.get("ambiguous"):
            return RowFailure("ambiguous_key", "its origin comes again in the unit, with another text")
        name = self._options.field or "caption"
        for fault in field_text(row.scalars.get("fields"), "not_text").split("; "):
            if fault.startswith(f"{name}: "):
                return RowFailure("not_text", fault)
        apart = field_text(row.scalars.get("fields"), "not_side_by_side")
        return RowFailure("not_side_by_side", apart) if apart else None

    def _caption(self, row: Row, table: TableRows) -> tuple[str, str]:
        """Return the caption of a sample, empty if there is none, and the detail of the failure in that case."""
        options, source = self._options, row.scalars["caption"] or ""
        if options.field is not None:
            fallback = source if options.fallback else ""
            text = field_text(row.scalars.get("fields"), options.field)
            return text or fallback, f"no text came as {options.field!r}"
        if self._joined is not None:
            entry = table.get(row.scalars[options.by])
            if entry is AMBIGUOUS or (entry is None and table.get(_own_name(row.scalars[options.by])) is AMBIGUOUS):
                raise RowFailure("ambiguous_key", f"its {options.by} comes again in the table with another caption")
            return (entry or {}).get("caption") or "", f"the table has none for its {options.by}"
        return source, "no caption came with it"


def _own_name(key: str) -> str:
    """Strip the file's number that a source puts before names that begin again in each file."""
    return FILE_NUMBER.sub("", key)


def field_text(fields: str | None, name: str) -> str:
    """Return a field of a sample's `fields` (a JSON object, or empty) if it is a text, else ""."""
    value = json.loads(fields).get(name) if fields else None
    return value if isinstance(value, str) else ""


def join_spec(
    column: str, options: CaptionsColumn, pattern: str, revisions: Mapping[str, str] | None = None
) -> JoinSpec:
    """Describe the table behind `pattern`, and how the captions of a column are looked up in it.

    Args:
        revisions: as `list_files` has it.

    Raises:
        RequestError: there is no such file, or it is no table.
    """
    listing = list_files(pattern, f"columns.{column}.join", revisions)
    return _spec_of(column, options, pattern, by_content(listing))


def known_join_spec(corpus: Corpus, column: str, options: CaptionsColumn, pattern: str) -> JoinSpec | None:
    """Describe the table that a declared column has in the corpus, though its file may be gone; None if it has none."""
    identity = corpus.column(column).made_by.get("table") if column in corpus.columns() else None
    if not isinstance(identity, dict) or "sha256" not in identity:
        return None
    spec = _spec_of(column, options, pattern, Listing((RemoteFile(pattern, ""),), identity))
    return spec if corpus.store.exists(f"{spec.base}.json") else None


def _spec_of(column: str, options: CaptionsColumn, pattern: str, listing: Listing) -> JoinSpec:
    where = f"columns.{column}.join"
    reader = READERS.get(Path(listing.files[0].name).suffix)
    if reader is None:
        known = ", ".join(READERS)
        raise RequestError(f"{where} = {pattern!r}: {listing.files[0].name} is no table; expected one of {known}")
    key = options.key or {"key": "key", "origin": "url"}[options.by]
    return JoinSpec(listing, reader, key, {"caption": options.column}, what=where)


def by_content(listing: Listing) -> Listing:
    """Identify a listing by the bytes of its files if all are on this machine: names and folders do not matter then."""
    paths = [Path(file.url) for file in listing.files]
    if not all(path.is_file() for path in paths):
        return listing
    return Listing(
        listing.files, {"sha256": [_sha256(path, file.etag) for path, file in zip(paths, listing.files, strict=True)]}
    )


@lru_cache(maxsize=64)
def _sha256(path: Path, etag: str) -> str:
    """Hash a file; a changed size or time is another `etag`, so that it is hashed again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
