"""Remember which files a source has, so that it goes on when files are added, replaced or removed.

A unit is named by its file's number. The first build notes the files (docs/corpus.md, section 2); a later one keeps to
that list, whatever else its pattern stands for by then.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import UNITS, unit_name
from microdit.pipeline.corpus.records import Record
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
        etags = [file.etag if "://" in file.url else "" for file in files]
        names, sizes = [file.name for file in files], [file.size for file in files]
        return cls(source=source, identity=listing.identity, names=names, sizes=sizes, etags=etags)


@dataclass(frozen=True)
class _Change:
    """A known file that is another one now, or is gone (None)."""

    number: int
    name: str
    size: int | None
    file: RemoteFile | None


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

    A file whose unit is not read may have been replaced; one whose unit is read may be gone.

    Raises:
        RequestError: a file that was read is another one now, or one that was not is gone.
    """
    _, known = newest(corpus, source)
    if known is None:
        return now
    by_name = {file.name: file for file in now.files}
    files = [by_name.get(name) or RemoteFile(name, name) for name in known.names]
    if changes := _changes(known, by_name, "://" in (now.files[0].url if now.files else "")):
        read = {unit for _, unit in corpus.committed(UNITS, source)}
        _check(source, changes, {change.number for change in changes if unit_name(source, change.number) in read})
    fresh = [file for file in now.files if file.name not in set(known.names)]
    if fresh and grow:
        report(f"source {source}: {len(fresh):,} new files, the first is {fresh[0].name}")
        files += fresh
    elif fresh:
        report(f"source {source}: {len(fresh):,} new files, such as {fresh[0].name}, are left out; --grow takes them")
    return Listing(tuple(files), known.identity)


def _changes(known: KnownFiles, by_name: dict[str, RemoteFile], remote: bool) -> list[_Change]:
    changes = []
    for number, (name, size, etag) in enumerate(zip(known.names, known.sizes, known.etags, strict=True)):
        file = by_name.get(name)
        if file is None or file.size != size or (remote and file.etag != etag):
            changes.append(_Change(number, name, size, file))
    return changes


def _check(source: str, changes: list[_Change], read: Collection[int]) -> None:
    wrong = [change for change in changes if (change.file is not None) == (change.number in read)]
    if not wrong:
        return
    first = wrong[0]
    now = (
        "is not there" if first.file is None else f"had {first.size} bytes when it was read, and has {first.file.size}"
    )
    more = f", and so for {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
    raise RequestError(
        f"sources.{source}: {first.name} {now}{more}; a source keeps to its files. "
        "Put the old ones back, or give the source a new name"
    )
