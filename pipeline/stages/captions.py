"""Captions: what came with the image, or what a table says. Exactly one per sample and column."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.cleaning import CLEANING, clean_caption
from pipeline.config import BuildConfig, CaptionsColumn, OpenmojiSource
from pipeline.corpus import Commit, Corpus
from pipeline.errors import RequestError
from pipeline.joins import Joined, JoinSpec, build, is_built, reader_of
from pipeline.sources.remote import RemoteFile, list_files, scratch_folder
from pipeline.stages import IMAGES, ColumnSpec, Row, Task, attempts, commit_all, latest, read_lines, samples

SCALARS = {"caption": "string", "tokens": "int32"}
SURROGATES = re.compile("[\ud800-\udfff]")


class Captions:
    """`captions/<name>`: captions and their number of words. A sample without one fails with `no_caption`.

    What is no text fails with `not_text`: a number, or lone surrogates (JSON can write them, UTF-8 cannot).
    """

    device = "cpu"

    def __init__(self, name: str, options: CaptionsColumn, config: BuildConfig):
        self.name, self._options = name, options
        self._scratch = scratch_folder(config.resources.scratch)
        self._spec: JoinSpec | None = None
        self._joined: Joined | None = None
        stage: dict[str, Any] = {"stage": "captions", "version": 1, "from": "source"}
        if options.join is not None:
            self._spec = _spec(name, options, config)
            self._hashes = _hashes(self._spec)
            table = self._hashes or self._spec.listing.identity
            key, field = self._spec.key, self._spec.fields["caption"]
            stage |= {"from": "table", "by": options.by, "table": table, "key": key, "field": field}
        elif options.field is not None:
            stage |= {"from": "field", "field": options.field}
        if stage["from"] != "source":
            stage["fallback"] = options.fallback
        if options.clean is not None:
            stage["clean"] = {"like": options.clean, "version": CLEANING}
        self.columns = {name: ColumnSpec(stage, SCALARS, (IMAGES,))}

    def prepare(self, corpus: Corpus, say: Callable[[str], None]) -> None:
        """Have the table in the corpus: once, by the driver, before shards are handed out.

        Raises:
            RequestError: a file cannot be used, or is not the one that the column was declared with.
        """
        if self._spec is None or is_built(corpus, self._spec):
            return
        _sha256.cache_clear()
        if _hashes(self._spec) != self._hashes:
            raise RequestError(
                f"columns.{self.name}.join = {self._options.join!r}: it is not the table that the column was declared "
                "with; begin the build again"
            )
        build(corpus, self._spec, self._scratch, say)

    def load(self) -> None:
        pass

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        images = latest(corpus, IMAGES, task.ref)
        rows = list(read_lines(corpus, images))
        found = self._look_up(corpus, rows)
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [images])
            for row in samples(rows, made, task, IMAGES):
                caption, reason, detail = self._caption(row, found)
                for attempt in made.values():
                    if reason:
                        attempt.fail(row.row, row.key, reason, detail)
                    else:
                        attempt.add(row.row, row.key, caption=caption, tokens=len(caption.split()))
            return commit_all(made, task)

    def _look_up(self, corpus: Corpus, rows: list[Row]) -> Mapping[str, Mapping[str, Any]]:
        if self._spec is None:
            return {}
        if self._joined is None:
            self._joined = Joined(corpus.store, self._spec)
        return self._joined.get_many(row.scalars[self._options.by] for row in rows if row.ok)

    def _caption(self, row: Row, found: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, str]:
        """A row's caption, or why there is none: the reason and its detail."""
        options = self._options
        none = "no caption came with it"
        value: Any = row.scalars["caption"]
        if self._spec is not None:
            value = found.get(row.scalars[options.by], {}).get("caption")
            none = f"the table has none for its {options.by}"
        elif options.field is not None:
            fields = row.scalars.get("fields")
            value = json.loads(fields).get(options.field) if fields else None
            none = f"no text came with it as {options.field!r}"
        if options.fallback and not (isinstance(value, str) and value.split()):
            value = row.scalars["caption"]
        if value is not None and not isinstance(value, str):
            return "", "not_text", f"it is no text but {str(value)[:80]!r}"
        if not value or not value.split():
            return "", "no_caption", none
        if SURROGATES.search(value):
            return "", "not_text", "it has lone surrogates, which UTF-8 cannot write"
        if options.clean is not None and not (cleaned := clean_caption(value)):
            return "", "no_caption", f"cleaning left nothing of {value[:80]!r}"
        return cleaned if options.clean is not None else value, "", ""


def _spec(column: str, options: CaptionsColumn, config: BuildConfig) -> JoinSpec:
    assert options.join is not None
    what = f"columns.{column}.join"
    pattern = str(_openmoji_table(what, config)) if options.join == "openmoji" else options.join
    listing = list_files(pattern, what)
    reader = reader_of(listing, options.key, what)
    if reader == "tar_txt":
        return JoinSpec(listing, reader, "", {"caption": options.field or "txt"})
    key = options.key or {"origin": "url", "key": "key"}[options.by]
    return JoinSpec(listing, reader, key, {"caption": options.field or "caption"})


def _openmoji_table(what: str, config: BuildConfig) -> Path:
    from pipeline.sources.openmoji import Openmoji

    for name, options in config.sources.items():
        if isinstance(options, OpenmojiSource):
            return Openmoji(name, options).captions_table()
    raise RequestError(
        f"{what} = 'openmoji': there is no source with the adapter openmoji; give the path of a table"
    )


def _hashes(spec: JoinSpec) -> list[str]:
    """Of files on this machine what is in them: where they lie is no part of it. Empty for files elsewhere."""
    return [_sha256(file) for file in spec.listing.files if "://" not in file.url]


@lru_cache(maxsize=1024)
def _sha256(file: RemoteFile) -> str:
    try:
        with Path(file.url).open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"join table {file.url}: it cannot be read ({error.strerror})") from None
