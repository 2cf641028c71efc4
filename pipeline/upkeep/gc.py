"""Delete what killed writers left: orphaned attempts, old tables, unfinished multipart uploads."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, OBJECT, PROBES, RESERVED, UNITS
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.storage.object_info import ObjectInfo
from microdit.pipeline.storage.uploads import old_uploads
from microdit.pipeline.tables.published import Table
from microdit.pipeline.tables.sample_table import JOINS


def gc(corpus: Corpus, older_than_hours: float = 48, dry_run: bool = False) -> dict[str, Any]:
    """Remove what killed writers left: attempts that no commit names, unfinished files and uploads, probes, old tables.

    Args:
        older_than_hours: what is younger stays. Below 12 only if nothing is writing to the corpus: an attempt may be
            committed until it is 12 hours old.
        dry_run: remove nothing, say what would go.

    Returns:
        dict: `names` (sorted) of what went, `bytes`, and how many: `attempts`, `tables`, `unfinished` (probes among
        them), `uploads`.
    """
    limit = datetime.now(UTC) - timedelta(hours=older_than_hours)
    old = {item.name: item.size for item in corpus.store.list() if item.modified <= limit}
    stray = {name: match.groups() for name in old if (match := OBJECT.fullmatch(name))}
    # the commits are read after the listing: what was committed meanwhile is among them
    named, unreadable = _named(corpus)
    attempts = [
        name
        for name, where in stray.items()
        if name not in named and where not in unreadable and where[0].split("/")[0] not in RESERVED
    ]
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
    names = [*attempts, *tables, *probes, *(path.relative_to(str(corpus.store.root)).as_posix() for path in unfinished)]
    return {
        "dry_run": dry_run,
        "attempts": len(attempts),
        "tables": len(tables),
        "unfinished": len(unfinished) + len(probes),
        "uploads": len(uploads),
        "bytes": sum(old[name] for name in [*attempts, *tables]) + sum(unfinished.values()),
        "names": sorted([*names, *(upload["Key"] for _, upload in uploads)]),
    }


def _named(corpus: Corpus) -> tuple[set[str], set[tuple[str, ...]]]:
    """The objects that commits of any generation name, and the (column, source, shard) of commits that say nothing."""
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
    """All but the newest sample table and commit table, and the tables that samples are joined to."""
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
    try:
        found = path.stat()
    except FileNotFoundError:  # its writer has ended well
        return None
    return found.st_size if datetime.fromtimestamp(found.st_mtime, UTC) <= limit else None
