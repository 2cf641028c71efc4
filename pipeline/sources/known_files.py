"""Remember which files a source has, so that it goes on when files are added, replaced or removed.

A unit is named by its file's number. The first build notes the files (docs/reference/corpus.md, section 2);
a later one keeps to that list, whatever else its pattern stands for by then.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import UNITS, unit_name
from microdit.pipeline.corpus.records import Record
from microdit.pipeline.corpus.redeclare import is_unused_source, latest_declaration
from microdit.pipeline.files.remote_file import Listing, RemoteFile

RECORD = re.compile(r"units/([^/]+)\.(\d+)\.json")


class KnownFiles(Record):
    """The files of a source, in the order of their units, and the identity that its declaration states."""

    version: int = 1
    source: str
    identity: dict[str, Any]
    names: list[str]
    sizes: list[int | None]
    etags: list[str]

    @classmethod
    def of(cls, source: str, listing: Listing) -> "KnownFiles":
        """Note a listing. The version of a local file is its size: its time is another one in each copy."""
        files = listing.files
        etags = ["" if file.url.startswith("/") else file.etag for file in files]
        names, sizes = [file.name for file in files], [file.size for file in files]
        return cls(source=source, identity=listing.identity, names=names, sizes=sizes, etags=etags)

    def listing(self) -> Listing:
        """List the files as files that are gone: without an address."""
        files = zip(self.names, self.sizes, self.etags, strict=True)
        return Listing(tuple(RemoteFile(name, "", size, etag) for name, size, etag in files), self.identity)


def newest(corpus: Corpus, source: str) -> tuple[int, KnownFiles | None]:
    """Return the number of the next record of a source's files, and the newest one."""
    matches = [RECORD.fullmatch(item.name) for item in corpus.store.list("units")]
    numbers = [int(match[2]) for match in matches if match and match[1] == source]
    if not numbers:
        return 0, None
    return max(numbers) + 1, KnownFiles.parse(corpus.store.get(f"units/{source}.{max(numbers)}.json"))


def note(corpus: Corpus, source: str, listing: Listing) -> None:
    """Write a record of the files, unless the newest one is equal.

    Raises:
        RequestError: another build has written another one meanwhile.
    """
    number, known = newest(corpus, source)
    wanted = KnownFiles.of(source, listing)
    if known == wanted:
        return
    try:
        corpus.store.create(f"units/{source}.{number}.json", wanted.to_bytes())
    except FileExistsError:
        if newest(corpus, source)[1] != wanted:
            raise RequestError(
                f"source {source}: another build has noted other files for it in this moment; run the command again"
            ) from None


def kept_to(corpus: Corpus, source: str, now: Listing, grow: bool, report: Callable[[str], None]) -> Listing:
    """Return the files that the source knows, in their order, and behind them the new ones if it is to grow.

    A file that is gone has no address: its unit cannot be read, unless it was. One that was replaced is read if its
    unit was not; what is committed of it stays.
    """
    _, known = newest(corpus, source)
    if known is None or is_unused_source(corpus, source):
        return now
    by_name = {file.name: file for file in now.files}
    files = [by_name.get(old.name) or old for old in known.listing().files]
    read = {unit for _, unit in corpus.committed(UNITS, source)}
    changes = {n: change for n, change in _changes(known, by_name) if unit_name(source, n) in read}
    if changes:
        example = next(iter(changes.values()))
        report(
            f"source {source}: {len(changes):,} files are others than when they were read, such as {example}; "
            "what is committed of them stays"
        )
        for number in changes:  # the record goes on saying what was read
            files[number] = replace(files[number], size=known.sizes[number], etag=known.etags[number])
    fresh = [file for file in now.files if file.name not in set(known.names)]
    if fresh and grow:
        report(f"source {source}: {len(fresh):,} new files, the first is {fresh[0].name}")
        files += fresh
    elif fresh:
        report(f"source {source}: {len(fresh):,} new files, such as {fresh[0].name}, are left out; --grow takes them")
    return Listing(tuple(files), known.identity)


def declared_revisions(corpus: Corpus, source: str) -> dict[str, str]:
    """Return the revisions of the hub repositories whose tables a source's declaration names."""
    if source not in corpus.sources():
        return {}
    _, declaration = latest_declaration(corpus, source)
    tables = [table["files"] for table in declaration.made_by.get("tables", ())]
    return {files["repo"]: files["revision"] for files in tables if {"repo", "revision"} <= files.keys()}


def _changes(known: KnownFiles, by_name: Mapping[str, RemoteFile]) -> Iterator[tuple[int, str]]:
    """Yield the numbers of the files that were replaced, and how."""
    for number, (name, size, etag) in enumerate(zip(known.names, known.sizes, known.etags, strict=True)):
        file = by_name.get(name)
        if file is not None and file.size != size:
            yield number, f"{name} (it had {size} bytes, and has {file.size})"
        elif file is not None and "://" in file.url and file.etag != etag:
            yield number, f"{name} (its ETag is another one)"
