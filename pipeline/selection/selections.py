"""Selections: the rows that a query chose, immutable and named by their hash (docs/reference/corpus.md, section 6)."""

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from obstore.exceptions import BaseError
from pydantic import Field

from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COLUMN, COMMIT, ShardId, commit_name
from microdit.pipeline.corpus.records import Record, Size, canonical
from microdit.pipeline.corpus.shard_files import check_footer
from microdit.pipeline.curation.job import reads
from microdit.pipeline.selection.chosen_rows import PART, SELECTION, ChosenRows, SelectionHash, rows_by_shard
from microdit.pipeline.selection.queries import Parsed, named_queries, named_query, parse
from microdit.pipeline.selection.view import OpenView, asked_jobs, connected, jobs_of, run, run_apart
from microdit.pipeline.selection.weights import EQUAL, Shares, weigh
from microdit.pipeline.tables.database import SqlLimits
from microdit.pipeline.tables.sample_table import (
    BASE,
    JOB_COLUMNS,
    SampleTable,
    sample_table,
    table_fields,
    table_schema,
)

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Selection:
    """An immutable keep-list, identified by `name@hash`; `path` is its object in the corpus."""

    name: str
    hash: str
    path: str
    rows: int
    query: str
    columns: dict[str, str]
    """By column that the query reads, a hash of the commits that it had."""


def select(
    corpus: Corpus,
    name: str,
    sql: str | None = None,
    weights: Shares | None = None,
    limits: SqlLimits | None = None,
    spill: Path | None = None,
) -> Selection:
    """Save the rows of a query as a selection.

    The same query on the same commits of the columns that it reads gives the same file and hash.

    Args:
        sql: gives `source`, `shard`, `row` and, if wanted, `weight` (above 0; 1 if not given); other columns of
            `samples` may stand beside them, so that `SELECT * FROM samples WHERE ...` will do. None: the query of that
            name (`microdit.pipeline.selection.queries`).
        weights: how often each source comes, whatever its size; within a source the query's weights count.
        limits: what the query may take.
        spill: a folder for DuckDB's temporary files; None makes one.

    Raises:
        RequestError: the name or the SQL is wrong, or would give other rows on another day, or takes more than the
            limits, or the rows are none, double, or not samples with status `ok`, or the weights name other sources
            than there are.
    """
    if not NAME.fullmatch(name):
        raise RequestError(f"selection {name!r}: a name is letters, digits, - _ and ., and begins with no dot")
    sql = named_query(name).sql if sql is None else sql
    parsed = parse(sql)
    if unsteady := parsed.unsteady():
        raise RequestError(
            f"SQL: {unsteady} gives something else every time, a selection must not; to draw 1,000 rows take "
            "ORDER BY md5(id) LIMIT 1000"
        )
    table = sample_table(corpus)
    limits = limits or SqlLimits()
    with connected(
        corpus, table, limits, spill, threads=1
    ) as connection:  # which of equal rows a LIMIT takes is no race then
        jobs = jobs_of(corpus, table)
        known = {*table_schema(corpus.columns()).names, *JOB_COLUMNS.names, "contaminated"}
        chosen = ChosenRows.of(_chosen(connection, sql, limits, known))
        _check(connection, chosen)
    if weights is not None:
        chosen = weigh(chosen, weights)
    asked = {folder: jobs[folder].asked() for folder in asked_jobs(sql) if folder in jobs}
    columns = _pinned(corpus, table, parsed, [*asked])
    pinned = {"name": name, "query": sql, "rows": len(chosen), "columns": columns}
    pinned |= {"jobs": asked} if asked else {}
    pinned |= {"weights": weights if weights == EQUAL else dict(weights)} if weights is not None else {}
    about = canonical(pinned)
    digest, buffer = SelectionHash(about), io.BytesIO()
    with pq.ParquetWriter(buffer, SELECTION.with_metadata({"microdit": about}), compression="zstd") as writer:
        for part in chosen.parts():
            digest.update(part)
            writer.write_table(part, row_group_size=PART)
    selection = Selection(name, digest.value(), _selection_path(name, digest.value()), len(chosen), sql, columns)
    _save(corpus, selection, buffer)
    return selection


def _save(corpus: Corpus, selection: Selection, file: io.BytesIO) -> None:
    """Write the file of a selection into the corpus, where it may be already.

    Raises:
        RequestError: it cannot be written, or is there and damaged.
    """
    named = f"{selection.name}@{selection.hash}"
    try:
        corpus.store.create(selection.path, file.getvalue())
    except FileExistsError:
        load_selection(corpus, named)  # it is the same, or damaged
    except (OSError, BaseError) as error:
        raise RequestError(
            f"corpus {corpus.url}: the selection {named} of {selection.rows:,} rows cannot be written "
            f"({first_line(error)}): it is kept in the corpus, and needs the right to write; `microdit query` does not"
        ) from error


def select_apart(corpus: Corpus, name: str, sql: str | None, weights: Shares | None, limits: SqlLimits) -> Selection:
    """Save a selection as `select` does, in a process of its own: whatever the query does, it can be stopped."""
    sample_table(corpus)  # its making is not the query's
    return run_apart(limits, _select_with, corpus, name, sql, weights, limits)


def _select_with(
    spill: Path, corpus: Corpus, name: str, sql: str | None, weights: Shares | None, limits: SqlLimits
) -> Selection:
    return select(corpus, name, sql, weights, limits, spill)


def _pinned(corpus: Corpus, table: SampleTable, parsed: Parsed, jobs: list[str]) -> dict[str, str]:
    """Find the columns that a query reads, and hash the names of the commits that each has in the table."""
    fields = table_fields(corpus.columns())
    known = {*BASE.names, *JOB_COLUMNS.names, "contaminated", *(field.name for field in fields)}
    everything = parsed.star or not parsed.columns <= {name.lower() for name in known}  # a row as a whole, or an alias
    read = {field.column for field in fields if everything or field.name.lower() in parsed.columns}
    read |= {column for column in corpus.columns() if any(reads(folder, column) for folder in jobs)}
    commits: dict[str, list[str]] = {name: [] for name in sorted({"images", *read})}
    for name in table.names:
        column = COMMIT.fullmatch(name)
        if column is not None and column[1] in commits:
            commits[column[1]].append(name)
    return {column: _commits_hash(names) for column, names in commits.items()}


def _commits_hash(names: list[str]) -> str:
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


def changed_since(corpus: Corpus, selection: str) -> list[str]:
    """Find the columns that a selection (`name@hash`) was chosen by and that have other commits now."""
    name, _, digest = selection.partition("@")
    before = _read_about(corpus, name, digest).columns
    now = {
        column: sorted(commit_name(column, *shard_id, number) for shard_id, number in corpus.committed(column).items())
        for column in before
    }
    return [column for column, digest in before.items() if _commits_hash(now[column]) != digest]


def _chosen(connection: OpenView, sql: str, limits: SqlLimits, known: set[str]) -> pa.Table:
    """Run a query, and convert its result to the columns and types of a selection; no others are computed."""

    def narrowed(relation: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
        columns = {name.lower(): name for name in relation.columns}
        absent, unknown = {"source", "shard", "row"} - columns.keys(), columns.keys() - known - {"weight"}
        if absent or unknown or len(columns) != len(relation.columns):
            raise RequestError(
                f"SQL: it gives the columns {relation.columns}; expected source, shard and row, and weight if wanted"
            )
        wanted = [columns[name] for name in SELECTION.names if name in columns]
        if len(wanted) == len(columns):
            return relation
        try:
            connection.extract_statements(f"SELECT * FROM (\n{sql.strip().rstrip(';')}\n)")
        except duckdb.ParserException:  # a comment behind a semicolon cannot stand in parentheses
            return relation
        return relation.project(", ".join(f'"{name}"' for name in wanted))

    result = run(connection, sql, limits, narrowed)
    columns = {name.lower(): name for name in result.column_names}
    if not len(result):
        raise RequestError("SQL: it gives no rows; a selection has at least one")
    arrays = {name: result[columns[name]] for name in columns if name in SELECTION.names}
    arrays.setdefault("weight", pa.repeat(pa.scalar(1, pa.float32()), len(result)))
    for field in SELECTION:
        try:
            arrays[field.name] = pc.cast(arrays[field.name], field.type, safe=field.name != "weight")
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise RequestError(f"SQL: {field.name} must be {field.type}: {error}") from None
        if arrays[field.name].null_count:
            raise RequestError(f"SQL: {field.name} is null in {arrays[field.name].null_count} rows")
    weight = arrays["weight"]
    bad = pc.invert(pc.and_(pc.is_finite(weight), pc.greater(weight, 0)))
    if pc.any(bad).as_py():
        raise RequestError(f"SQL: a weight is {pc.filter(weight, bad)[0].as_py()}; expected finite numbers above 0")
    return pa.table([arrays[field.name] for field in SELECTION], names=SELECTION.names)


def _check(connection: OpenView, chosen: ChosenRows) -> None:
    """Refuse rows that are no samples, have no image, or are there twice."""
    if not chosen.double:
        good = connection.sql("SELECT source, shard, row FROM samples WHERE status = 'ok'").to_arrow_reader(PART)
        if chosen.all_in(good):
            return
        del good
    rows = len(chosen)  # what is wrong with them takes more memory to say
    connection.register("chosen", pa.concat_tables(chosen.parts()))
    bad = connection.execute(
        "SELECT c.source, c.shard, c.row, s.reason, count(*) OVER () FROM chosen c "
        "LEFT JOIN samples s USING (source, shard, row) WHERE s.status IS DISTINCT FROM 'ok' ORDER BY ALL LIMIT 1"
    ).fetchone()
    if bad:
        source, shard, row, reason, count = bad
        raise RequestError(
            f"SQL: {count} of {rows} rows are no samples with status ok (the first: row {row} of shard {shard} of "
            f"source {source}: {reason or 'there is no such row'}); add WHERE status = 'ok'"
        )
    double = connection.execute(
        "SELECT source, shard, row, count(*) AS n FROM chosen GROUP BY ALL HAVING n > 1 ORDER BY ALL LIMIT 1"
    ).fetchone()
    if double:
        source, shard, row, count = double
        raise RequestError(f"SQL: row {row} of shard {shard} of source {source} is there {count} times; expected once")


def selection_hash(about: bytes, table: pa.Table) -> str:
    """Hash the metadata and the rows: the first 16 hex digits of a SHA-256 (docs/reference/corpus.md, section 6)."""
    digest = SelectionHash(about)
    digest.update(table)
    return digest.value()


def _selection_path(name: str, digest: str) -> str:
    return f"selections/{name}@{digest}.parquet"


def list_selections(corpus: Corpus) -> list[Selection]:
    """List all selections of a corpus, by name and hash."""
    return [_read_about(corpus, *full.split("@", 1)) for full in _names(corpus)]


def _names(corpus: Corpus) -> list[str]:
    """List `name@hash` of all selections, sorted."""
    names = (item.name for item in corpus.store.list("selections"))
    return sorted(name.removeprefix("selections/").removesuffix(".parquet") for name in names)


def _read_about(corpus: Corpus, name: str, digest: str = "") -> Selection:
    path = _selection_path(name, digest)
    try:
        with corpus.store.open(path) as file:
            metadata = pq.read_metadata(file).metadata or {}
        about = _About.parse(metadata[b"microdit"])
    except (ValueError, KeyError, pa.ArrowException):
        raise RequestError(f"{path} is damaged: it does not say what it is; make the selection again") from None
    return Selection(name, digest, path, about.rows, about.query, about.columns)


class _About(Record):
    """Metadata of a selection."""

    rows: Size
    query: str
    columns: dict[Annotated[str, Field(pattern=f"^(?:{COLUMN.pattern})$")], str] = Field(default_factory=dict)
    """Those of older selections do not say."""


def find_selection(corpus: Corpus, selection: str) -> str:
    """Resolve the name of a selection to `name@hash`.

    Args:
        selection: `name@hash`, or `name` if there is only one of that name.

    Raises:
        RequestError: there is none, or there are several.
    """
    names = _names(corpus)
    matching = [full for full in names if selection in (full, full.partition("@")[0])]
    if len(matching) != 1:
        what = "there is no such selection" if not matching else "there are several of that name"
        known = not matching and selection in {query.name for query in named_queries()}
        ready = f"; `microdit select {corpus.url} {selection}` makes it" if known else ""
        raise RequestError(
            f"selection {selection!r} of corpus {corpus.url}: {what}; "
            f"give one of: {', '.join(matching or names) or 'none, make one with `microdit select`'}{ready}"
        )
    return matching[0]


def load_selection(corpus: Corpus, selection: str) -> pa.Table:
    """Load the rows of a selection: `source`, `shard`, `row` (int32), `weight` (float32), ordered by the first three.

    Args:
        selection: as `find_selection` takes it.

    Raises:
        RequestError: there is none, there are several, or it is damaged.
    """
    return pa.concat_tables(_checked_parts(corpus, selection))


def selected_rows(corpus: Corpus, selection: str) -> dict[ShardId, tuple[np.ndarray, np.ndarray]]:
    """Read the rows (int32) and weights (float32) of a selection, by shard. Raises as `load_selection`."""
    return rows_by_shard(_checked_parts(corpus, selection))


def _checked_parts(corpus: Corpus, selection: str) -> Iterator[pa.Table]:
    """Read a selection in parts, the last of which comes when all of it is checked. Raises as `load_selection`."""
    name, _, digest = find_selection(corpus, selection).partition("@")
    path = _selection_path(name, digest)
    damaged = RequestError(
        f"corpus {corpus.url}: {path} is damaged; restore it from a copy, or remove it and select again"
    )
    try:
        file = pq.ParquetFile(io.BytesIO(corpus.store.get(path)))
        schema = file.schema_arrow
        said = (schema.metadata or {}).get(b"microdit", b"")
        check_footer(file.metadata, _About.parse(said).rows, "its metadata")
        found = SelectionHash(said)
        if not schema.equals(SELECTION):
            raise damaged
        parts = (file.read_row_group(number) for number in range(file.num_row_groups))
        part = schema.empty_table()
        for following in parts:
            found.update(following)
            yield part
            part = following
    except (pa.ArrowException, OSError, ValueError):
        raise damaged from None
    if found.value() != digest:
        raise damaged
    yield part
