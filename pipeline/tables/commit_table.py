"""The commit table: all commits as lines of one object, so that nobody reads a million small ones twice.

It is a cache like the sample table (docs/reference/corpus.md, section 6): commits that it lacks are read one by one,
and when those were many, a new table is published.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from microdit.pipeline.base.errors import DamagedError
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, TABLE, UNITS, commit_name
from microdit.pipeline.corpus.shard_files import check_footer
from microdit.pipeline.tables.published import Table, if_allowed, publish

FOLDER = "tables/commits"
LAYOUT = 1
LEAST = 1000  # commits that were read one by one before a table is worth its writing; later a tenth of all
AT_ONCE, BATCH = 32, 50_000  # commits that a thread reads in one go, and lines of a part of the table
SAVE_EVERY = 500_000  # commits that were read: a run that is stopped goes on from there (millions take minutes)
CommitLine = dict[str, Any]  # of the table, by the names of `LINE`

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


class CommitId(NamedTuple):
    """Identity of a commit; of a unit's commit the column is `units`, and the unit stands for the shard."""

    column: str
    source: str
    shard: str
    generation: int


def commit_table(corpus: Corpus, damage: list[str] | None = None) -> pa.Table:
    """Read one line (`LINE`) for every commit that is listed, of every generation, in no order.

    A unit's commit has `units` for its column, the unit for its shard, and its inputs as `in`.

    Args:
        damage: if given, commits that cannot be understood are reported there, and left out.

    Raises:
        DamagedError: a commit cannot be understood, and none of its shard is newer.
    """
    read = read_commits(corpus)
    for commit_id, error in read.damaged.items():
        if not _has_newer(read.table, commit_id):
            if damage is None:
                raise error
            damage.append(str(error))
    return read.table


@dataclass(frozen=True)
class CommitsRead:
    """The lines of all commits that can be understood, and what else the listing says."""

    table: pa.Table
    damaged: dict[CommitId, DamagedError]
    written: dict[str, datetime]
    """By column when its newest commit was written."""


def read_commits(corpus: Corpus) -> CommitsRead:
    """Read the lines of all commits; publish the table if many of them were new."""
    known, published = _newest(corpus)
    names, old, written = _listed(corpus, published)
    missing = names.filter(pc.invert(pc.and_(old, pc.is_in(names, value_set=known["name"].combine_chunks()))))
    if len(names) - len(missing) < len(known):  # some are not listed any more, or were made again
        known = known.filter(pc.is_in(known["name"], value_set=names.filter(old)))
    damaged: dict[CommitId, DamagedError] = {}
    table, saved = known, len(known)
    for part in _with_progress(_read(corpus, missing, damaged), len(missing)):
        table = pa.concat_tables([table, part])
        if len(table) - saved >= SAVE_EVERY:
            _publish(corpus, table)
            saved = len(table)
    if len(table) - saved >= max(LEAST, saved // 10):
        _publish(corpus, table)
    return CommitsRead(table, damaged, written)


def _with_progress(parts: Iterator[pa.Table], total: int) -> Iterator[pa.Table]:
    """Pass the parts on; if there are many lines, a bar on the terminal (standard error) shows how many are read."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("reading commits"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=total <= BATCH or not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("commits", total=total)
        for part in parts:
            bar.advance(task, len(part))
            yield part


def _listed(corpus: Corpus, published: datetime) -> tuple[pa.Array, pa.Array, dict[str, datetime]]:
    """List all commits: names, which of them were written before a table was published, and each column's newest time.

    A commit that was removed and made again has the name of the old one: what the table says is not of it.
    """
    names: list[str] = []
    old: list[bool] = []
    written: dict[str, datetime] = {}
    for item in corpus.store.list("commits"):
        column = item.name.removeprefix("commits/").rsplit("/", 2)[0]
        if column not in written or written[column] < item.modified:
            written[column] = item.modified
        names.append(item.name)
        old.append(item.modified <= published)
    return pa.array(names, pa.string()), pa.array(old, pa.bool_()), written


def _newest(corpus: Corpus) -> tuple[pa.Table, datetime]:
    """Open the table that was published last, and tell when; an empty one if there is none. Delete damaged ones."""
    manifests = sorted(corpus.store.list(FOLDER), key=lambda item: item.modified, reverse=True)
    for item in manifests:
        name = item.name
        if not (name.endswith(".json") and TABLE.fullmatch(name)):
            continue
        try:
            record = Table.parse(corpus.store.get(name))
            data = corpus.store.get(record.object.name)
            if hashlib.sha256(data).hexdigest() == record.object.sha256:
                file = pq.ParquetFile(io.BytesIO(data))
                check_footer(file.metadata, record.rows, "its record")
                if file.schema_arrow.equals(LINE):
                    return file.read(), item.modified
        except FileNotFoundError:
            continue
        except ValueError:  # pyarrow's errors are, too
            pass
        with if_allowed():
            corpus.store.delete([name])
    return LINE.empty_table(), datetime.min.replace(tzinfo=UTC)


def _has_newer(table: pa.Table, commit_id: CommitId) -> bool:
    """Check for a commit of a higher generation of the same shard."""
    column, source, shard, generation = commit_id
    same = pc.and_(pc.equal(table["shard"], shard), pc.equal(table["column"], column))
    newer = pc.and_(pc.equal(table["source"], source), pc.greater(table["generation"], generation))
    return bool(pc.any(pc.and_(same, newer)).as_py())


def _read(corpus: Corpus, names: pa.Array, damaged: dict[CommitId, DamagedError]) -> Iterator[pa.Table]:
    """Read commits, in tables of many lines; those that cannot be understood are added to `damaged`."""

    def read(name: pa.StringScalar) -> CommitLine | None:
        match = COMMIT.fullmatch(name.as_py())
        if match is None:  # `verify` reports it
            return None
        commit_id = CommitId(match[1], match[2], match[3], int(match[4]))
        try:
            return _line(corpus, commit_id)
        except FileNotFoundError:  # gone since the listing
            return None
        except DamagedError as error:
            damaged[commit_id] = error
            return None

    def read_some(start: int) -> list[CommitLine]:
        return [line for name in names[start : start + AT_ONCE] if (line := read(name)) is not None]

    lines: list[CommitLine] = []
    for some in threaded(read_some, range(0, len(names), AT_ONCE)):
        lines += some
        if len(lines) >= BATCH:
            yield pa.Table.from_pylist(lines, LINE)
            lines = []
    yield pa.Table.from_pylist(lines, LINE)


def _line(corpus: Corpus, commit_id: CommitId) -> CommitLine:
    """Read one commit as a line."""
    line = commit_id._asdict() | {"name": commit_name(*commit_id)}
    if commit_id.column == UNITS:
        return line | {"in": corpus.unit(*commit_id[1:]).inputs}
    commit = corpus.commit(*commit_id)
    return line | {
        **commit.counts,
        "sha256": commit.sha256,
        "bytes": commit.size,
        "seconds": commit.timings.get("seconds", 0.0),
        "reasons": [{"reason": reason, "count": count} for reason, count in sorted(commit.reasons.items())],
        "inputs": [item.model_dump() for item in commit.inputs],
    }


def _publish(corpus: Corpus, table: pa.Table) -> None:
    """Publish the table, if there is the right to write."""
    table = table.sort_by("name")
    digest = hashlib.sha256(f"{LAYOUT}\n".encode())
    for chunk in table["name"].chunks:
        digest.update("".join(f"{name}\n" for name in chunk.to_pylist()).encode())

    def write(path: Path) -> int:
        pq.write_table(table, path, compression="zstd")
        return len(table)

    with if_allowed():
        publish(corpus, f"{FOLDER}/{digest.hexdigest()}", write, lambda object, rows: Table(object=object, rows=rows))


# -- totals ------------------------------------------------------------------------------------------------------------
@dataclass
class Totals:
    """Sums over the newest commits of one column and source; of `units`, `done` and `inputs` alone are counted."""

    done: int = 0
    stale: int = 0
    """Shards with an input that was committed again since."""
    inputs: int = 0
    out: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


# few shards have a second generation: to search for those alone is much cheaper than a window over all
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


def newest_lines(table: pa.Table) -> pa.Table:
    """Keep of a commit table the newest generation of each shard, and unit."""
    from microdit.pipeline.tables.database import connect  # DuckDB is not what reading commits needs

    with connect() as connection:
        connection.register("lines", table)
        connection.execute(NEWEST)
        return connection.sql("SELECT * FROM newest").to_arrow_table()


def totals(table: pa.Table) -> dict[tuple[str, str], Totals]:
    """Add up a commit table, by column and source."""
    added: dict[tuple[str, str], Totals] = {}
    from microdit.pipeline.tables.database import connect  # DuckDB is not what reading commits needs

    with connect() as connection:
        connection.register("lines", table)
        connection.execute(NEWEST)
        for column, source, *sums in connection.execute(COUNTS).fetchall():
            done, inputs, out, failed, size, seconds = (value or 0 for value in sums)
            added[column, source] = Totals(done, 0, int(inputs), int(out), int(failed), int(size), float(seconds))
        for column, source, reason, count in connection.execute(REASONS).fetchall():
            added[column, source].reasons[reason] = int(count)
        for column, source, count in connection.execute(STALE).fetchall():
            added[column, source].stale = count
    return added
