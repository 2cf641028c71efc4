"""Captions: the one that came with the image, a field, or one from a table. Exactly one per sample and column."""

import hashlib
import json
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.config.sources import OpenmojiSource
from microdit.pipeline.content.alt_text import clean_caption
from microdit.pipeline.content.caption_faults import SURROGATES
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import latest, read_lines
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing
from microdit.pipeline.stages.captions.asking import SCALARS
from microdit.pipeline.stages.rows import attempts, commit_all, samples
from microdit.pipeline.stages.stage import ColumnSpec, Task
from microdit.pipeline.tables.joins.lookup import Joined
from microdit.pipeline.tables.joins.spec import JoinSpec

READERS = {".parquet": "parquet", ".jsonl": "jsonl", ".gz": "jsonl", ".json": "jsonl"}


class Captions:
    """`captions/<name>`: captions and their number of words. A sample without one fails with `no_caption`.

    One with lone surrogates (JSON can write them, UTF-8 cannot) fails with `not_text`. `table` is what has to be in the
    corpus before the first shard: `declare` puts it there.
    """

    device = None

    def __init__(self, name: str, options: CaptionsColumn, config: BuildConfig | None = None):
        self.name, self._options = name, options
        self.table: JoinSpec | None = None
        self._joined: Joined | None = None
        stage: dict[str, Any] = {"stage": "captions", "version": 2, "from": "source"}
        if options.field is not None:
            stage |= {"from": "field", "field": options.field, "fallback": options.fallback}
        if options.join is not None:
            self.table = _table(name, options, config)
            stage |= {"from": "table", "by": options.by, "table": self.table.listing.identity}
            stage |= {"key": self.table.key, "column": options.column}
        if options.clean is not None:
            stage |= {"clean": options.clean}
        if options.kind is not None:
            stage |= {"kind": options.kind}
        self.columns = {name: ColumnSpec(stage, SCALARS, (IMAGES,))}

    def load(self) -> None:
        pass

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        images = latest(corpus, IMAGES, task.ref)
        if self.table is not None and self._joined is None:
            self._joined = Joined(corpus.store, self.table)
        rows = list(read_lines(corpus, images))
        table: dict[str, dict[str, Any]] = {}
        if self._joined is not None:  # all at once: the order of a shard is not that of the table
            table = self._joined.get_many(row.scalars[self._options.by] for row in rows if row.ok)
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [images])
            for row in samples(rows, made, task, IMAGES):
                caption, where = self._caption(row.scalars, table)
                if self._options.clean is not None:
                    caption = clean_caption(caption)
                for attempt in made.values():
                    if not caption.split():
                        attempt.fail(row.row, row.key, "no_caption", where)
                    elif SURROGATES.search(caption):
                        attempt.fail(row.row, row.key, "not_text", "it has lone surrogates, which UTF-8 cannot write")
                    else:
                        attempt.add(row.row, row.key, caption=caption, tokens=len(caption.split()))
            return commit_all(made, task)

    def _caption(self, line: dict[str, Any], table: dict[str, dict[str, Any]]) -> tuple[str, str]:
        """The caption of a sample, empty if there is none, and where none was found."""
        options, source = self._options, line["caption"] or ""
        if options.field is not None:
            fallback = source if options.fallback else ""
            return field_text(line.get("fields"), options.field) or fallback, f"no text came as {options.field!r}"
        if self._joined is not None:
            found = table.get(line[options.by], {})
            return found.get("caption") or "", f"the table has none for its {options.by}"
        return source, "no caption came with it"


def field_text(fields: str | None, name: str) -> str:
    """A field of a sample's `fields` (a JSON object, or empty) if it is a text, else nothing."""
    found = json.loads(fields).get(name) if fields else None
    return found if isinstance(found, str) else ""


def _table(column: str, options: CaptionsColumn, config: BuildConfig | None) -> JoinSpec:
    where = f"columns.{column}.join"
    pattern = str(options.join)
    if pattern == "openmoji":
        pattern = _openmoji(column, config)
    listing = list_files(pattern, where)
    reader = READERS.get(Path(listing.files[0].name).suffix)
    if reader is None:
        known = ", ".join(READERS)
        raise RequestError(f"{where} = {pattern!r}: {listing.files[0].name} is no table; expected one of {known}")
    key = options.key or {"key": "key", "origin": "url"}[options.by]
    return JoinSpec(by_content(listing), reader, key, {"caption": options.column}, what=where)


def by_content(listing: Listing) -> Listing:
    """The same, known by the bytes of its files if all are on this machine: then neither name nor place matters."""
    paths = [Path(file.url) for file in listing.files]
    if not all(path.is_file() for path in paths):
        return listing
    return Listing(
        listing.files, {"sha256": [_sha256(path, file.etag) for path, file in zip(paths, listing.files, strict=True)]}
    )


@lru_cache(maxsize=64)
def _sha256(path: Path, etag: str) -> str:
    """Of a file that has size and time as in `etag`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _openmoji(column: str, config: BuildConfig | None) -> str:
    from microdit.pipeline.sources.openmoji.source import Openmoji

    for name, options in config.sources.items() if config is not None else ():
        if isinstance(options, OpenmojiSource):
            return str(Openmoji(name, options).captions_table())
    raise RequestError(
        f"columns.{column}.join = 'openmoji': there is no source with the adapter openmoji; give the path of a table"
    )
