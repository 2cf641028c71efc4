"""`microdit gc`: delete what killed writers left in a corpus, and nothing else.

The contract: docs/reference/corpus.md, section 9.
"""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from obstore.exceptions import BaseError

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.attempt import MAX_ATTEMPT_HOURS
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, OBJECT, PART, UNITS
from microdit.pipeline.corpus.ownership import Ownership
from microdit.pipeline.corpus.presence import is_living
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.storage.disk import UNFINISHED
from microdit.pipeline.storage.object_info import ObjectInfo
from microdit.pipeline.storage.uploads import old_uploads
from microdit.pipeline.tables.published import Table
from microdit.pipeline.tables.sample_table import JOINS, named_parts


@dataclass(frozen=True)
class Garbage:
    """Objects that `gc` deleted, or with `dry_run` would delete: counts by sort, their bytes, and all names, sorted."""

    dry_run: bool
    attempts: int
    """Objects of attempts that no commit names."""
    tables: int
    unfinished: int
    """Files that were being written, and probes."""
    uploads: int
    """Multipart uploads of S3."""
    bytes: int
    """Of attempts, tables and unfinished files."""
    names: list[str]
    builds: int
    """Builds that are at work on the corpus: what is younger than 12 hours was left to them."""
    foreign: list[str]
    """Folders of other corpora below the root, which were left alone."""


def gc(corpus: Corpus, older_than_hours: float = 48, dry_run: bool = False) -> Garbage:
    """Delete what killed writers left: attempts that no commit names, unfinished files and uploads, probes, old tables.

    Other corpora below the root, and whatever else this corpus did not write, are left alone.

    Args:
        older_than_hours: keep what is younger; at least 12 hours while a build is at work on the corpus, because an
            attempt may be committed until it is so old.
        dry_run: delete nothing.

    Raises:
        RequestError: a commit cannot be read, so that nobody knows what it names.
    """
    began = datetime.now(UTC)
    listed = {item.name: item for item in corpus.store.list()}
    own = Ownership.of(corpus, listed)
    probes = [item for name, item in listed.items() if own.owns_probe(name)]
    living = {item.name for item in probes if is_living(corpus, item)}
    limit = began - timedelta(hours=max(older_than_hours, MAX_ATTEMPT_HOURS) if living else older_than_hours)
    old = {name: item.size for name, item in listed.items() if item.modified <= limit}
    # reads the commits after the listing: what was committed meanwhile is kept
    attempts = _orphans(corpus, [name for name in old if own.owns_attempt(name)])
    tables = _old_tables(corpus, [name for name in old if own.owns_table(name)], own)
    unfinished = _unfinished(corpus, own, limit)
    prefix = corpus.url.partition("://")[2].partition("/")[2]
    uploads = [
        (client, upload)
        for client, upload in old_uploads(corpus.url, limit)
        if own.owns(upload["Key"].removeprefix(f"{prefix}/" if prefix else ""))
    ]
    dead = [item.name for item in probes if item.name in old and item.name not in living]
    if not dry_run:
        corpus.store.delete([*attempts, *tables, *dead])
        for path in unfinished:
            path.unlink(missing_ok=True)
        for client, upload in uploads:
            client.abort_multipart_upload(**upload)
    files = [path.relative_to(str(corpus.store.root)).as_posix() for path in unfinished]
    return Garbage(
        dry_run=dry_run,
        attempts=len(attempts),
        tables=len(tables),
        unfinished=len(unfinished) + len(dead),
        uploads=len(uploads),
        bytes=sum(old[name] for name in [*attempts, *tables]) + sum(unfinished.values()),
        names=sorted([*attempts, *tables, *dead, *files, *(upload["Key"] for _, upload in uploads)]),
        builds=len(living),
        foreign=list(own.foreign),
    )


def _orphans(corpus: Corpus, names: list[str]) -> list[str]:
    """List the attempts' objects among the names that no commit of any generation names.

    Attempts at a shard with a damaged commit are kept: it may name them.
    """
    candidates = {name: match.groups() for name in names if (match := OBJECT.fullmatch(name))}
    if not candidates:
        return []
    named, damaged = _named_objects(corpus)
    return [name for name, shard in candidates.items() if name not in named and shard not in damaged]


def _named_objects(corpus: Corpus) -> tuple[set[str], set[tuple[str, ...]]]:
    """Collect the objects that commits of any generation name, and the (column, source, shard) of damaged ones.

    Raises:
        RequestError: one cannot be read.
    """
    named: set[str] = set()
    damaged: set[tuple[str, ...]] = set()

    def read(name: str) -> tuple[str, Commit | None]:
        try:
            return name, Commit.parse(corpus.store.get(name))
        except (ValueError, FileNotFoundError):
            return name, None
        except (OSError, BaseError) as error:
            raise RequestError(
                f"corpus {corpus.url}: {name} cannot be read ({first_line(error)}), and what it names is not known: "
                "nothing was removed; check your rights and the storage, then run it again"
            ) from error

    commits = [item.name for item in corpus.store.list("commits") if not item.name.startswith(f"commits/{UNITS}/")]
    for name, commit in threaded(read, commits):
        if commit is not None:
            named |= {commit.object.name, commit.sidecar.name}
        elif match := COMMIT.fullmatch(name):
            damaged.add(match.groups()[:3])
    return named, damaged


def _old_tables(corpus: Corpus, names: list[str], own: Ownership) -> list[str]:
    """List what is no part of the sample table, no newest table of its folder, and none that samples are joined to."""
    newest: dict[str, ObjectInfo] = {}
    for item in corpus.store.list("tables"):
        folder = item.name.rpartition("/")[0]
        folder = item.name if folder == JOINS else folder
        is_record = item.name.endswith(".json") and own.owns_table(item.name) and folder != "tables"  # an old layout
        if is_record and (folder not in newest or newest[folder].modified < item.modified):
            newest[folder] = item
    keep: set[str] = set()
    for item in newest.values():
        with suppress(ValueError, FileNotFoundError):  # it is a cache
            keep |= {Table.parse(corpus.store.get(item.name)).object.name, item.name}
    if any(PART.fullmatch(name) for name in names):
        keep |= {ref.name for ref in named_parts(corpus)}
    return [name for name in names if name not in keep]


def _unfinished(corpus: Corpus, own: Ownership, limit: datetime) -> dict[Path, int]:
    """Find the files of this corpus that were being written, and not since `limit`: {path: size}."""
    found: dict[Path, int] = {}
    for path in corpus.store.unfinished():
        name = UNFINISHED.sub("", path.relative_to(str(corpus.store.root)).as_posix())
        if own.owns(name) and (size := _size_if_old(path, limit)) is not None:
            found[path] = size
    return found


def _size_if_old(path: Path, limit: datetime) -> int | None:
    """Return the size of a file that was not written to since `limit`; None if it was, or if it is gone."""
    try:
        info = path.lstat()
    except FileNotFoundError:  # its writer ended well
        return None
    return info.st_size if datetime.fromtimestamp(info.st_mtime, UTC) <= limit else None
