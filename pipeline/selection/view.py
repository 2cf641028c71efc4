"""SQL over the sample table: the view `samples` (docs/reference/corpus.md, section 6)."""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from microdit.pipeline.base.bounded_process import ProcessDied, run_bounded
from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.base.temporary_folder import temporary_folder
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.marks import MARKS, Marks, marks_table
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.shard_files import check_footer
from microdit.pipeline.curation.duplicates import ContaminatedTable, DuplicatesTable
from microdit.pipeline.curation.job import CONTAMINATED, DUPLICATES, ROW_ID, SEMANTIC, TableJob, job_base, job_since
from microdit.pipeline.curation.semantic import SemanticTable
from microdit.pipeline.selection.needed_columns import DESCRIBES, asked_jobs, needed
from microdit.pipeline.selection.queries import parse
from microdit.pipeline.selection.running import TOO_LARGE, TOO_LONG, LimitError, Shape, run_select
from microdit.pipeline.tables.database import GIB, SqlLimits, connect
from microdit.pipeline.tables.part_files import PartFiles
from microdit.pipeline.tables.part_specs import FieldGroup
from microdit.pipeline.tables.published import Table, cached, damage_of, open_table
from microdit.pipeline.tables.sample_table import JOB_COLUMNS, SampleTable, ViewColumn, sample_table, view_columns

T = TypeVar("T")
SPILL = "microdit-sql-"
BESIDE = GIB  # bytes that a process of its own needs beside a query and its result

CONFINED: dict[str, str | bool | int | float | list[str]] = {  # the SQL may be a stranger's
    "python_enable_replacements": False,
    "enable_external_access": False,
}

SQL_TYPES = {
    pa.string(): "VARCHAR",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
}

MARK = re.compile(r"\bmark(_note)?\b", re.I)
SCORES = re.compile(
    r"(nsfw|aesthetic|clip|basic|turned)(_\w+)?$|text_(area|boxes|characters)$|caption_(characters|words|language|repetition)$"
)


@dataclass(frozen=True)
class JobView:
    """View of a table job's table."""

    record: type[TableJob]
    command: str
    """Of `microdit`, which makes it."""
    columns: str
    """SQL; `{present}` is the condition that a sample has what the job reads."""


# as the jobs choose, but among the rows that a query's WHERE leaves; a sample that is in no group stays
ONE_PER_GROUP = (
    "CREATE MACRO one_per_group(group_id) AS (group_id IS NULL OR row_number() OVER (PARTITION BY group_id ORDER BY "
    "original_width::BIGINT * original_height DESC NULLS LAST, source, shard, row) = 1)"
)

JOBS = {  # by the job's folder
    DUPLICATES: JobView(
        DuplicatesTable,
        "dedup",
        "duplicate_group, duplicate_distance, CASE WHEN {present} THEN coalesce(duplicate_exact, false) END AS "
        "duplicate_exact, CASE WHEN {present} THEN coalesce(duplicate_keep, true) END AS duplicate_keep",
    ),
    SEMANTIC: JobView(
        SemanticTable,
        "dedup --semantic",
        "semantic_group, semantic_similarity, CASE WHEN {present} THEN coalesce(semantic_keep, true) END AS "
        "semantic_keep",
    ),
    CONTAMINATED: JobView(
        ContaminatedTable,
        "decontaminate",
        "CASE WHEN {present} THEN contaminated_by IS NOT NULL END AS contaminated, contaminated_by, "
        "contaminated_distance",
    ),
}


def query(corpus: Corpus, sql: str, limits: SqlLimits | None = None) -> pa.Table:
    """Run a SQL query over the view `samples`; nothing but that view can be reached.

    Raises:
        RequestError: the SQL is wrong, with DuckDB's message; or it would take more than the limits.
    """
    limits = limits or SqlLimits()
    with connected(corpus, table_for(corpus, sql), limits) as connection:
        return run(connection, sql, limits)


def query_apart(corpus: Corpus, sql: str, limits: SqlLimits) -> pa.Table:
    """Run a SQL query as `query` does, but in a process of its own: whatever it does, it can be stopped at any time."""
    table = table_for(corpus, sql)  # its making is not the query's
    return run_apart(limits, _query_table, corpus, table, sql, limits)


def table_for(corpus: Corpus, sql: str, rows_only: bool = False) -> SampleTable:
    """Open the sample table, with the parts that a query reads.

    Args:
        rows_only: nothing but `source`, `shard`, `row` and `weight` is taken of the query's result.

    Raises:
        RequestError: as `sample_table`.
    """
    declared = corpus.columns()
    columns = view_columns(declared) if IMAGES in declared else []
    first = needed(sql, columns, {}, rows_only)
    table = sample_table(corpus, reads=[column.name for column in first.columns])
    jobs = {folder: job.present for folder, job in jobs_of(corpus, table).items()}
    table.make(corpus, needed(sql, columns, jobs, rows_only).groups)
    return table


def _query_table(spill: Path, corpus: Corpus, table: SampleTable, sql: str, limits: SqlLimits) -> pa.Table:
    with connected(corpus, table, limits, spill) as connection:
        return run(connection, sql, limits)


def run_apart(limits: SqlLimits, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of SQL in a process of its own; its first argument is a folder for DuckDB's temporary files.

    Raises:
        LimitError: it took more than the limits allow.
        RequestError: the function's.
    """
    memory = 2 * limits.memory + BESIDE
    with temporary_folder(SPILL) as spill:
        try:
            answer: T = run_bounded(function, spill, *arguments, seconds=limits.seconds, memory=memory)
            return answer
        except TimeoutError:
            raise LimitError(TOO_LONG.format(seconds=limits.seconds)) from None
        except MemoryError:
            raise LimitError(TOO_LARGE.format(gib=limits.memory / GIB)) from None
        except ProcessDied as error:
            raise LimitError(
                f"SQL: {error}, perhaps for want of memory; give it more with --memory, or write it in another way"
            ) from None


@contextmanager
def connected(
    corpus: Corpus,
    table: SampleTable,
    limits: SqlLimits,
    spill: Path | None = None,
    **config: str | bool | int | float | list[str],
) -> Iterator["OpenView"]:
    """Connect to the view `samples` and the macro `one_per_group`, and nothing else.

    Args:
        spill: a folder for temporary files; None makes one.
        config: further settings of DuckDB.
    """
    with (
        temporary_folder(SPILL) if spill is None else nullcontext(spill) as folder,
        _opened(**limits.settings, **config, temp_directory=str(folder)) as connection,
    ):
        view = OpenView(corpus, table, connection, folder)
        connection.execute(ONE_PER_GROUP)
        connection.execute("SET allowed_directories = ?", [view.files.folders])
        for name, value in CONFINED.items():
            connection.execute(f"SET {name} = {value}")
        connection.execute("SET lock_configuration=true")
        yield view


class OpenView:
    """A connection that has the view `samples`; it shows the columns that the next query needs."""

    def __init__(self, corpus: Corpus, table: SampleTable, connection: duckdb.DuckDBPyConnection, folder: Path):
        self.corpus, self.table, self.connection = corpus, table, connection
        self.files = PartFiles(corpus, table, folder)
        self.columns = view_columns(corpus.columns())
        self.jobs = jobs_of(corpus, table)
        self.runs: Sequence[int] | None = None
        """The parts whose rows the next query sees, in order; None for all."""
        self.marks: int | None = None
        """Number of marks the view shows; None as long as no query has asked for them."""
        self._may_mark = not {"mark", "mark_note"} & {column.name for column in self.columns}
        self._shown: tuple[object, ...] | None = None
        connection.register("sample_marks", MARKS.empty_table())
        for number, (name, job) in enumerate(self.jobs.items()):
            connection.register(f"job_{number}", _view(corpus, job, folder, job_schema(name)))
        for group, schema in table.schemas.items():  # by an empty file each: DuckDB opens the first at once
            pq.write_table(schema.empty_table(), self._empty(group))
        self.show(None)
        self.sql, self.execute, self.register = connection.sql, connection.execute, connection.register
        self.extract_statements, self.interrupt = connection.extract_statements, connection.interrupt

    def show(self, sql: str | None, rows_only: bool = False) -> None:
        """Make the view of what a query needs; None shows the names of all columns, and no rows.

        Args:
            rows_only: as `needed` takes it.

        Raises:
            RequestError: a part is damaged.
        """
        described = sql is not None and bool(DESCRIBES.match(sql))
        present = {folder: job.present for folder, job in self.jobs.items()}
        wanted = needed("FROM samples" if sql is None or described else sql, self.columns, present, rows_only)
        groups = [group for group in wanted.groups if group in self.table.schemas]
        runs = None if self.runs is None else tuple(self.runs)
        marked = self._may_mark and self._shows_marks(sql, wanted.whole)
        sql = None if described else sql
        shown = (tuple(wanted.columns), tuple(wanted.jobs), runs, marked)
        if shown == self._shown and sql is not None:
            return
        self._shown = None if sql is None else shown
        if sql is not None:
            self.files.make(groups)
        numbers = {group: number for number, group in enumerate(groups)}
        files = {group: [] if sql is None else self.files.paths(group, runs) for group in groups}
        tables = [f"read_parquet({_texts([self._empty(g), *files[g]])}) AS p{n}" for g, n in numbers.items()]
        shape = [f"{_column_sql(c, numbers)} AS {_quoted(c.name)}" for c in wanted.columns]
        rows = f"SELECT {', '.join(shape)} FROM {' POSITIONAL JOIN '.join(tables)}"
        if not wanted.jobs and not marked:
            self.connection.execute(f"CREATE OR REPLACE VIEW samples AS {rows}")
            return
        joined, more = f"({rows}) AS sample_rows", ["sample_rows.*"]
        for folder in wanted.jobs:
            joined += f" LEFT JOIN job_{list(self.jobs).index(folder)} USING (source, shard, row)"
            more.append(JOBS[folder].columns.format(present=present[folder]))
        if marked:
            joined += " LEFT JOIN sample_marks USING (source, shard, row)"
            more.append("mark, mark_note")
        self.connection.execute(f"CREATE OR REPLACE VIEW samples AS SELECT {', '.join(more)} FROM {joined}")

    def _shows_marks(self, sql: str | None, whole: bool) -> bool:
        """Tell whether a query names marks, or reads all columns and there are some; they are read when they are."""
        named = sql is None or MARK.search(sql) is not None
        if sql is not None and self.marks is None and (named or whole):
            marks = Marks(self.corpus)
            marks.read()
            self.show_marks(marks_table(marks.newest().values()), marks.next)
        return named or (whole and bool(self.marks))

    def show_marks(self, table: pa.Table, count: int) -> None:
        """Show these marks in further queries, which are the first `count` of the corpus."""
        self.connection.register("sample_marks", table)
        self.marks, self._shown = count, None

    def _empty(self, group: FieldGroup) -> str:
        return str(self.files.spill / f"{list(self.table.schemas).index(group)}.empty.parquet")


def _column_sql(column: ViewColumn, numbers: Mapping[FieldGroup, int]) -> str:
    """Write the SQL of a column of the view; constant where its column has no commits."""
    if not {*column.groups} <= numbers.keys():
        return "false" if column.field == "ok" else f"NULL::{SQL_TYPES[column.type]}"
    first, *others = (f"p{numbers[group]}" for group in column.groups)
    return f"{first}.source || '/' || {others[0]}.key" if others else f"{first}.{_quoted(column.field)}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _texts(values: Sequence[str]) -> str:
    """Write a SQL list of strings."""
    return "[" + ", ".join("'" + value.replace("'", "''") + "'" for value in values) + "]"


@contextmanager
def _opened(**config: Any) -> Iterator[duckdb.DuckDBPyConnection]:
    connection = connect(**config)
    try:
        yield connection
    finally:
        with suppress(duckdb.ResourceInUseException):  # a query that was given up, and heeds no interrupt
            connection.close()


def _view(corpus: Corpus, table: Table, spill: Path, schema: pa.Schema) -> ds.FileSystemDataset:
    """Open a published table for DuckDB, by a path.

    Several scans of one query would share a Python file, which deadlocks and mixes up reads.

    Raises:
        RequestError: it is damaged, or has other columns than `schema`.
    """
    path = (corpus.store.root or spill) / table.object.name
    if corpus.store.root is None and not path.is_file():
        path = spill / path.name
        with open_table(corpus, table) as file, path.open("wb") as copy:
            shutil.copyfileobj(file, copy, 16 << 20)
    with damage_of(corpus.url, table):
        fragment = ds.ParquetFileFormat().make_fragment(str(path), LocalFileSystem())
        check_footer(fragment.metadata, table.rows, "its record")
        if not fragment.physical_schema.equals(schema):
            raise ValueError(f"its columns are {str(fragment.physical_schema)[:200]!r}")
        return ds.FileSystemDataset([fragment], schema, fragment.format)


def job_schema(folder: str) -> pa.Schema:
    """Return the schema of the table of a job."""
    prefix = folder.removeprefix("tables/").removesuffix("s")
    return pa.schema([*ROW_ID, *(field for field in JOB_COLUMNS if field.name.startswith(prefix))])


def jobs_of(corpus: Corpus, table: SampleTable) -> dict[str, TableJob]:
    """Find the table jobs that read the very commits of this sample table, by folder."""
    jobs = {
        folder: cached(corpus, job_base(folder, table), view.record, job_since(folder, table))
        for folder, view in JOBS.items()
    }
    return {folder: job for folder, job in jobs.items() if job is not None}


def run(
    view: OpenView, sql: str, limits: SqlLimits | None = None, shape: Shape | None = None, rows_only: bool = False
) -> pa.Table:
    """Run one SELECT, or EXPLAIN one.

    Args:
        shape: makes what is run of what it gives, as `run_select` takes it.
        rows_only: as `needed` takes it.

    Raises:
        RequestError: the SQL is wrong, with DuckDB's message and the commands that make missing columns; or it takes
            more than the limits.
    """
    try:
        view.show(sql, rows_only)
        try:
            table = run_select(view.connection, sql, limits or SqlLimits(), shape)
        except duckdb.BinderException:  # with all columns, among which it finds what was meant
            view.show(None)
            view.sql(sql)
            view.show("FROM samples")
            table = run_select(view.connection, sql, limits or SqlLimits(), shape)
    except duckdb.Error as error:
        message = str(error)
        if isinstance(error, duckdb.BinderException):
            available = {name for name, *_ in view.sql("DESCRIBE samples").fetchall()}
            commands = makers(parse(sql).columns - available)
            lines = [f"\n{', '.join(names)}: from {command}" for command, names in commands.items()]
            message = "".join([first_line(error), *lines]) if lines else message
        raise RequestError(f"SQL: {message}") from None
    for i, field in enumerate(table.schema):
        if field.type == pa.decimal128(38, 0):  # the type of DuckDB's 128-bit sums
            with suppress(pa.ArrowInvalid):  # larger than 64 bits: it stays
                table = table.set_column(i, field.name, pc.cast(table[i], pa.int64()))
    return table


def makers(missing: Iterable[str]) -> dict[str, list[str]]:
    """Map each command that could produce a missing column to the columns that it would produce."""
    columns: dict[str, list[str]] = {}
    for name in sorted(missing):
        jobs = [JOBS[folder].command for folder in asked_jobs(name)]
        if jobs:
            columns.setdefault(f"`microdit {jobs[0]}`, run again whenever the corpus has changed", []).append(name)
        elif scorer := SCORES.match(name):
            block = f"`scores/{scorer[0].partition('_')[0]}` in the config of the corpus, and `microdit build`"
            columns.setdefault(block, []).append(name)
    return columns
