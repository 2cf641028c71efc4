"""What is in a corpus and how far it is, and what a killed writer left in it: status, ls, gc, verify."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.corpus import Commit, Corpus, InputRef
from pipeline.errors import RequestError
from pipeline.failures import failures, read_failure
from pipeline.parallel import threaded
from pipeline.records import COMMIT, OBJECT, PROBES, RESERVED, UNITS
from pipeline.tables import SampleTable
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
    sources = {name: _source_status(corpus, name) for name in sorted(corpus.sources())}
    columns: dict[str, dict[str, Any]] = {column: {source: _nothing() for source in sources} for column in declared}
    newest: dict[tuple[str, str, str], tuple[int, str]] = {}
    inputs: dict[tuple[str, str, str], list[InputRef]] = {}
    for column in declared:
        for commit in corpus.commits(column):
            where = (column, commit.source, commit.shard)
            newest[where], inputs[where] = (commit.generation, commit.sha256), commit.inputs
            _count(columns[column].setdefault(commit.source, _nothing()), commit)
    for (column, source, shard), read in inputs.items():
        there = ((item, newest.get((item.column, source, shard), (-1, ""))) for item in read)
        columns[column][source]["stale"] += any(
            found[0] > item.generation or (found[0] == item.generation and found[1] != item.sha256)
            for item, found in there
        )
    aside = [record for column in [*declared, UNITS] for record in _set_aside(corpus, column, newest)]
    for record in aside:
        if record["column"] in columns:
            columns[record["column"]].setdefault(record["source"], _nothing())["set_aside"] += 1
    for column, by_source in columns.items():
        for source, entry in by_source.items():
            images = columns.get("images", {}).get(source, _nothing())["done"]
            complete = source in sources and sources[source]["units"] == sources[source]["units_done"]
            entry["left"] = images - entry["done"] if column != "images" else 0 if complete else None
            entry["seconds"] = round(entry["seconds"], 3)
            entry["rate"] = round(entry["in"] / entry["seconds"], 3) if entry["seconds"] else None
            entry["reasons"] = dict(sorted(entry["reasons"].items()))
    return {
        "corpus": corpus.url,
        "name": corpus.name,
        "shard_samples": corpus.shard_samples,
        "sources": sources,
        "columns": columns,
        "set_aside": aside,
    }


def _source_status(corpus: Corpus, source: str) -> dict[str, Any]:
    units, expected = corpus.units(source), corpus.source(source).stage.get("units")
    return {
        "units": expected if isinstance(expected, int) else None,
        "units_done": len(units),
        "inputs": sum(unit.inputs for unit in units.values()),
    }


def _nothing() -> dict[str, Any]:
    return dict.fromkeys(("done", "left", "set_aside", "stale", "in", "out", "failed", "bytes"), 0) | {
        "seconds": 0.0,
        "rate": None,
        "reasons": Counter(),
    }


def _count(entry: dict[str, Any], commit: Commit) -> None:
    entry["done"] += 1
    for name in ("in", "out", "failed"):
        entry[name] += commit.counts[name]
    entry["reasons"].update(commit.reasons)
    entry["bytes"] += commit.size
    entry["seconds"] += commit.timings.get("seconds", 0.0)


def _set_aside(corpus: Corpus, column: str, newest: dict[tuple[str, str, str], Any]) -> Iterator[dict[str, Any]]:
    done = corpus.committed(UNITS) if column == UNITS else {where[1:] for where in newest if where[0] == column}
    for (source, shard), number in sorted(failures(corpus, column).items()):
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
    uploads = _old_uploads(corpus, limit)
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
    """All but the table of the newest manifest."""
    manifests = sorted(
        (item for item in corpus.store.list("tables") if item.name.endswith(".json")), key=lambda item: item.modified
    )
    keep: set[str] = set()
    if manifests:
        try:
            keep = {manifests[-1].name, SampleTable.parse(corpus.store.get(manifests[-1].name)).object.name}
        except (ValueError, FileNotFoundError):
            keep = set()  # it is a cache
    return [name for name in names if name not in keep]


def _size_if_old(path: Path, limit: datetime) -> int | None:
    try:
        found = path.stat()
    except FileNotFoundError:  # its writer has ended well
        return None
    return found.st_size if datetime.fromtimestamp(found.st_mtime, UTC) <= limit else None


def _old_uploads(corpus: Corpus, limit: datetime) -> list[tuple[Any, dict[str, str]]]:
    """Multipart uploads that were begun and never ended: S3 keeps, and charges for, their parts; others drop them."""
    where = urlsplit(corpus.url)
    if where.scheme != "s3":
        return []
    import boto3
    from botocore.exceptions import ClientError

    client = boto3.client("s3")
    pages = client.get_paginator("list_multipart_uploads").paginate(
        Bucket=where.netloc, Prefix=f"{where.path.strip('/')}/".removeprefix("/")
    )
    try:
        return [
            (client, {"Bucket": where.netloc, "Key": item["Key"], "UploadId": item["UploadId"]})
            for page in pages
            for item in page.get("Uploads", [])
            if item["Initiated"] <= limit
        ]
    except ClientError as error:
        raise RequestError(f"corpus {corpus.url}: its unfinished uploads cannot be listed: {error}") from error


__all__ = ["gc", "ls", "status", "verify"]
