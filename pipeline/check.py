"""What is in a corpus and how far it is, and what a killed writer left in it: status, ls, gc, verify."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.commit_table import Totals, commit_table, totals
from pipeline.corpus import Commit, Corpus
from pipeline.failures import failures, read_failure
from pipeline.parallel import threaded
from pipeline.records import COMMIT, OBJECT, PROBES, RESERVED, UNITS
from pipeline.store import ObjectInfo
from pipeline.tables import JOINS, Table
from pipeline.uploads import old_uploads
from pipeline.verify import verify

# -- status ----------------------------------------------------------------------------------------------------------


def status(corpus: Corpus) -> dict[str, Any]:
    """How far a corpus is, for people and as JSON.

    `sources`, by name: `units` (how many its declaration says, None if it does not), `units_done`, `inputs` (of them).
    `columns`, by name and source: `done`, `left`, `set_aside` and `stale` (shards; `left` of the images is None while
    units are missing, because nobody knows yet how many shards they have), `in`, `out`, `failed` (samples), `reasons`,
    `bytes`, `seconds` (of work), `rate` (samples a second of one worker). `set_aside`: what was given up, and why.
    """
    declared = sorted(corpus.columns())
    table = commit_table(corpus)
    found = totals(table)
    sources = {}
    for name in sorted(corpus.sources()):
        units, expected = found.get((UNITS, name), Totals()), corpus.source(name).stage.get("units")
        sources[name] = {
            "units": expected if isinstance(expected, int) else None,
            "units_done": units.done,
            "inputs": units.inputs,
        }
    aside = [record for column in [*declared, UNITS] for record in _set_aside(corpus, column, table)]
    given_up = Counter((record["column"], record["source"]) for record in aside)
    columns: dict[str, dict[str, Any]] = {column: {} for column in declared}
    for column, source in dict.fromkeys([*((c, s) for c in declared for s in sources), *found, *given_up]):
        if column not in columns:
            continue
        there = found.get((column, source), Totals())
        images = found.get(("images", source), Totals()).done
        complete = source in sources and sources[source]["units"] == sources[source]["units_done"]
        columns[column][source] = {
            "done": there.done,
            "left": images - there.done if column != "images" else 0 if complete else None,
            "set_aside": given_up[column, source],
            "stale": there.stale,
            "in": there.inputs,
            "out": there.out,
            "failed": there.failed,
            "bytes": there.bytes,
            "seconds": round(there.seconds, 3),
            "rate": round(there.inputs / there.seconds, 3) if there.seconds else None,
            "reasons": dict(sorted(there.reasons.items())),
        }
    return {
        "corpus": corpus.url,
        "name": corpus.name,
        "shard_samples": corpus.shard_samples,
        "sources": sources,
        "columns": columns,
        "set_aside": aside,
    }


def _set_aside(corpus: Corpus, column: str, table: pa.Table) -> Iterator[dict[str, Any]]:
    if not (recorded := failures(corpus, column)):
        return
    there = table.filter(pc.equal(table["column"], column))
    done = set(zip(there["source"].to_pylist(), there["shard"].to_pylist(), strict=True))
    for (source, shard), number in sorted(recorded.items()):
        if (source, shard) not in done:
            yield read_failure(corpus, column, source, shard, number).model_dump(exclude={"traceback", "version"})


# -- committed objects -----------------------------------------------------------------------------------------------


def ls(corpus: Corpus, column: str) -> Iterator[str]:
    """Paths or URLs of the committed objects of a column, by source and shard, for any library that reads them.

    Shards without a sample are left out: `datasets` takes the features from the first one.

    Raises:
        RequestError: there is no such column.
    """
    corpus.column(column)
    for commit in corpus.commits(column):
        if commit.counts["out"]:
            yield f"{corpus.url}/{commit.object.name}"


# -- what killed writers left ----------------------------------------------------------------------------------------


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


__all__ = ["gc", "ls", "status", "verify"]
