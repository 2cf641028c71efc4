"""The commit table: what all commits say, in one object, so that nobody reads a million small ones twice.

It is a cache like the sample table (docs/corpus.md, section 6): what it lacks is read from the commits themselves, and
when that was much, a new table is published.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.exceptions import PermissionDeniedError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from microdit.pipeline.base.errors import DamagedError
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, UNITS, commit_name
from microdit.pipeline.tables.database import connect
from microdit.pipeline.tables.published import Table, publish

Where = tuple[str, str, str, int]  # column, source, shard or unit, generation
FOLDER = "tables/commits"
LAYOUT = 1
LEAST = 1000  # commits that were read one by one before a table is worth its writing; later a tenth of all
AT_ONCE, BATCH = 32, 50_000  # commits that a thread reads in one go, and lines of a part of the table
SAVE_EVERY = 500_000  # commits that were read: who is stopped in the minutes that millions take goes on from there
FORBIDDEN = (PermissionDeniedError, PermissionError)

LINE = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("column", pa.string()),
        pa.field("source", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("generation", pa.int32()),
        pa.field("sha256", pa.string()),
        pa.field("in", pa.int64()),
        pa.field("out", pa.int64()),
        pa.field("failed", pa.int64()),
        pa.field("bytes", pa.int64()),
        pa.field("seconds", pa.float64()),
        pa.field("reasons", pa.list_(pa.struct([("reason", pa.string()), ("count", pa.int64())]))),
        pa.field(
            "inputs",
            pa.list_(pa.struct([("column", pa.string()), ("generation", pa.int32()), ("sha256", pa.string())])),
        ),
    ]
)


def commit_table(corpus: Corpus, damage: list[str] | None = None) -> pa.Table:
    """One line (`LINE`) for every commit that is listed, of every generation, in no order.

    A unit's commit has `units` for its column, the unit for its shard, and its inputs as `in`.

    Args:
        damage: given, a commit that cannot be understood is told there, and left out.

    Raises:
        DamagedError: a commit cannot be understood, and none of its shard is newer.
    """
    names = pa.array(corpus.store.names("commits"), pa.string())
    known = _newest(corpus)
    missing = names.filter(pc.invert(pc.is_in(names, value_set=known["name"].combine_chunks())))
    if len(names) - len(missing) < len(known):
        known = known.filter(pc.is_in(known["name"], value_set=names))  # some are not listed any more
    damaged: dict[Where, DamagedError] = {}
    table, saved = known, len(known)
    for part in _told(_read(corpus, missing, damaged), len(missing)):
        table = pa.concat_tables([table, part])
        if len(table) - saved >= SAVE_EVERY:
            _publish(corpus, table)
            saved = len(table)
    for where, error in damaged.items():
        if not _newer(table, where):
            if damage is None:
                raise error
            damage.append(str(error))
    if len(table) - saved >= max(LEAST, saved // 10):
        _publish(corpus, table)
    return table


def _told(parts: Iterator[pa.Table], total: int) -> Iterator[pa.Table]:
    """The same parts; where there are many lines a bar on the terminal, beside what is printed, tells how many."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("reading commits"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=total <= BATCH or not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("commits", total=total)
        for part in parts:
            bar.advance(task, len(part))
            yield part


def _newest(corpus: Corpus) -> pa.Table:
    """The table that was published last; an empty one if there is none. What is damaged makes room for another."""
    manifests = sorted(corpus.store.list(FOLDER), key=lambda item: item.modified, reverse=True)
    for name in [item.name for item in manifests if item.name.endswith(".json")]:
        try:
            about = Table.parse(corpus.store.get(name))
            data = corpus.store.get(about.object.name)
            if hashlib.sha256(data).hexdigest() == about.object.sha256:
                table = pq.read_table(io.BytesIO(data))
                if table.schema.equals(LINE):
                    return table
        except FileNotFoundError:
            continue
        except ValueError:  # pyarrow's errors are, too
            pass
        with suppress(*FORBIDDEN):
            corpus.store.delete([name])
    return LINE.empty_table()


def _newer(table: pa.Table, where: Where) -> bool:
    """Is there a newer commit of a shard?"""
    column, source, shard, generation = where
    found = pc.and_(pc.equal(table["shard"], shard), pc.equal(table["column"], column))
    found = pc.and_(found, pc.and_(pc.equal(table["source"], source), pc.greater(table["generation"], generation)))
    return bool(pc.any(found).as_py())


def _read(corpus: Corpus, names: pa.Array, damaged: dict[Where, DamagedError]) -> Iterator[pa.Table]:
    """What commits say, in tables of many lines; those that cannot be understood are told in `damaged`."""

    def read(name: pa.StringScalar) -> dict[str, Any] | None:
        match = COMMIT.fullmatch(name.as_py())
        if match is None:  # that is for `verify` to tell
            return None
        where = match[1], match[2], match[3], int(match[4])
        try:
            return _line(corpus, where)
        except FileNotFoundError:  # gone since the listing
            return None
        except DamagedError as error:
            damaged[where] = error
            return None

    def read_some(start: int) -> list[dict[str, Any]]:
        return [line for name in names[start : start + AT_ONCE] if (line := read(name)) is not None]

    lines: list[dict[str, Any]] = []
    for some in threaded(read_some, range(0, len(names), AT_ONCE)):
        lines += some
        if len(lines) >= BATCH:
            yield pa.Table.from_pylist(lines, LINE)
            lines = []
    yield pa.Table.from_pylist(lines, LINE)


def _line(corpus: Corpus, where: Where) -> dict[str, Any]:
    line = dict(zip(("column", "source", "shard", "generation"), where, strict=True)) | {"name": commit_name(*where)}
    if where[0] == UNITS:
        return line | {"in": corpus.unit(*where[1:]).inputs}
    commit = corpus.commit(*where)
    return line | {
        **commit.counts,
        "sha256": commit.sha256,
        "bytes": commit.size,
        "seconds": commit.timings.get("seconds", 0.0),
        "reasons": [{"reason": reason, "count": count} for reason, count in sorted(commit.reasons.items())],
        "inputs": [item.model_dump() for item in commit.inputs],
    }


def _publish(corpus: Corpus, table: pa.Table) -> None:
    table = table.sort_by("name")
    digest = hashlib.sha256(f"{LAYOUT}\n".encode())
    for chunk in table["name"].chunks:
        digest.update("".join(f"{name}\n" for name in chunk.to_pylist()).encode())

    def write(path: Path) -> int:
        pq.write_table(table, path, compression="zstd")
        return len(table)

    with suppress(*FORBIDDEN):  # to look at a corpus the right to read it is enough
        publish(corpus, f"{FOLDER}/{digest.hexdigest()}", write, lambda object, rows: Table(object=object, rows=rows))


# -- what it adds up to ------------------------------------------------------------------------------------------------
@dataclass
class Totals:
    """The newest commits of one column and source added up; of `units`, `inputs` alone is counted."""

    done: int = 0
    stale: int = 0
    """Shards of which an input was committed again since."""
    inputs: int = 0
    out: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


# few shards have a second generation: to look for those alone is much less than a window over all
NEWEST = """
CREATE TEMP TABLE replaced AS
SELECT DISTINCT l.name FROM lines AS l JOIN lines AS m USING ("column", source, shard)
WHERE m.generation > 0 AND m.generation > l.generation;
CREATE TEMP VIEW newest AS SELECT * FROM lines ANTI JOIN replaced USING (name)
"""

COUNTS = """
SELECT "column", source, count(*), sum("in"), sum(out), sum(failed), sum(bytes), sum(seconds) FROM newest GROUP BY ALL
"""

REASONS = """
SELECT "column", source, r.reason, sum(r.count)
FROM (SELECT "column", source, unnest(reasons) AS r FROM newest) GROUP BY ALL
"""

STALE = """
SELECT c."column", c.source, count(DISTINCT c.shard)
FROM (SELECT "column", source, shard, unnest(inputs) AS i FROM newest) AS c
JOIN newest AS n ON n."column" = c.i."column" AND n.source = c.source AND n.shard = c.shard
WHERE n.generation > c.i.generation OR (n.generation = c.i.generation AND n.sha256 != c.i.sha256)
GROUP BY ALL
"""


def totals(table: pa.Table) -> dict[tuple[str, str], Totals]:
    """A commit table added up, by column and source."""
    found: dict[tuple[str, str], Totals] = {}
    with connect() as connection:
        connection.register("lines", table)
        connection.execute(NEWEST)
        for column, source, *sums in connection.execute(COUNTS).fetchall():
            done, inputs, out, failed, size, seconds = (value or 0 for value in sums)
            found[column, source] = Totals(done, 0, int(inputs), int(out), int(failed), int(size), float(seconds))
        for column, source, reason, count in connection.execute(REASONS).fetchall():
            found[column, source].reasons[reason] = int(count)
        for column, source, count in connection.execute(STALE).fetchall():
            found[column, source].stale = count
    return found
