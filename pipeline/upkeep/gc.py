"""`microdit gc`: delete orphaned attempts, old tables, unfinished files and multipart uploads, and probes."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, OBJECT, PROBES, RESERVED, UNITS
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.storage.object_info import ObjectInfo
from microdit.pipeline.storage.uploads import old_uploads
from microdit.pipeline.tables.published import Table
from microdit.pipeline.tables.sample_table import JOINS


@dataclass(frozen=True)
class Garbage:
    """What `gc` deleted, or with `dry_run` would delete: counts by sort, their bytes, and all names, sorted."""

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


def gc(corpus: Corpus, older_than_hours: float = 48, dry_run: bool = False) -> Garbage:
    """Delete what killed writers left: attempts that no commit names, unfinished files and uploads, probes, old tables.

    Args:
        older_than_hours: keep what is younger. Below 12 only if nothing is writing to the corpus: an attempt may be
            committed until it is 12 hours old.
        dry_run: delete nothing.
    """
    limit = datetime.now(UTC) - timedelta(hours=older_than_hours)
    old = {item.name: item.size for item in corpus.store.list() if item.modified <= limit}
    attempts = _orphans(corpus, old)  # reads the commits after the listing: what was committed meanwhile is kept
    tables = _old_tables(corpus, [name for name in old if name.startswith("tables/")])
    unfinished = {path: size for path in corpus.store.unfinished() if (size := _size_if_old(path, limit)) is not None}
    uploads = old_uploads(corpus.url, limit)
    probes = [name for name in old if name.startswith(f"{PROBES}/")]  # of builds that were killed
    if not dry_run:
        corpus.store.delete([*attempts, *tables, *probes])
        for path in unfinished:
            path.unlink(missing_ok=True)
        for client, upload in uploads:
            client.abort_multipart_upload(**upload)
    files = [path.relative_to(str(corpus.store.root)).as_posix() for path in unfinished]
    return Garbage(
        dry_run=dry_run,
        attempts=len(attempts),
        tables=len(tables),
        unfinished=len(unfinished) + len(probes),
        uploads=len(uploads),
        bytes=sum(old[name] for name in [*attempts, *tables]) + sum(unfinished.values()),
        names=sorted([*attempts, *tables, *probes, *files, *(upload["Key"] for _, upload in uploads)]),
    )


def _orphans(corpus: Corpus, names: dict[str, int]) -> list[str]:
    """List the attempts' objects among the names that no commit of any generation names.

    Attempts at a shard with an unreadable commit are kept: it may name them.
    """
    candidates = {name: match.groups() for name in names if (match := OBJECT.fullmatch(name))}
    named, unreadable = _named_objects(corpus)
    return [
        name
        for name, shard in candidates.items()
        if name not in named and shard not in unreadable and shard[0].split("/")[0] not in RESERVED
    ]


def _named_objects(corpus: Corpus) -> tuple[set[str], set[tuple[str, ...]]]:
    """Collect the objects that commits of any generation name, and the (column, source, shard) of unreadable ones."""
    named: set[str] = set()
    unreadable: set[tuple[str, ...]] = set()

    def read(name: str) -> tuple[str, Commit | None]:
        try:
            return name, Commit.parse(corpus.store.get(name))
        except ValueError:
            return name, None

    commits = [item.name for item in corpus.store.list("commits") if not item.name.startswith(f"commits/{UNITS}/")]
    for name, commit in threaded(read, commits):
        if commit is not None:
            named |= {commit.object.name, commit.sidecar.name}
        elif match := COMMIT.fullmatch(name):
            unreadable.add(match.groups()[:3])
    return named, unreadable


def _old_tables(corpus: Corpus, names: list[str]) -> list[str]:
    """List all but the newest sample table and commit table, and the tables that samples are joined to."""
    newest: dict[str, ObjectInfo] = {}
    for item in corpus.store.list("tables"):
        folder = item.name.rpartition("/")[0]
        folder = item.name if folder == JOINS else folder
        if item.name.endswith(".json") and (folder not in newest or newest[folder].modified < item.modified):
            newest[folder] = item
    keep: set[str] = set()
    for item in newest.values():
        with suppress(ValueError, FileNotFoundError):  # it is a cache
            keep |= {Table.parse(corpus.store.get(item.name)).object.name, item.name}
    return [name for name in names if name not in keep]


def _size_if_old(path: Path, limit: datetime) -> int | None:
    """The size of a file that was not written to since `limit`; None if it was, or if it is gone."""
    try:
        info = path.stat()
    except FileNotFoundError:  # its writer ended well
        return None
    return info.st_size if datetime.fromtimestamp(info.st_mtime, UTC) <= limit else None
