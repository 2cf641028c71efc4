"""Run one SELECT of anybody's: nothing else, within limits, and so that a signal ends it."""

import re
import threading
from collections.abc import Callable
from typing import TypeVar

import duckdb
import pyarrow as pa

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.selection.queries import EXPECTED, TOO_DEEP
from microdit.pipeline.tables.database import GIB, SqlLimits

TOO_LONG = "SQL: it was stopped after {seconds:g} seconds; give it a longer --timeout, or let it read less"
TOO_LARGE = (
    "SQL: it or its result needs more than {gib:.3g} GiB of memory; give it more with --memory, or let it read less, "
    "by a WHERE or a LIMIT for example"
)
TOO_MUCH_DISK = (
    "SQL: its temporary files need more than {gib:.3g} GiB; give it more with --disk, and TMPDIR where the room is, "
    "or let it read less"
)
EXPLAINED = re.compile(r"\s*explain\s+(analyze\s+|\(\s*(?:analyze|format)\b[\w\s,]*\)\s*|)(.*)", re.I | re.S)
BATCH = 65_536  # rows of the result that are taken at a time
END = 1.0  # seconds that a query may take to end after it was interrupted
T = TypeVar("T")
Shape = Callable[[duckdb.DuckDBPyRelation], duckdb.DuckDBPyRelation]


class LimitError(RequestError):
    """A query takes more than its limits."""


def run_select(
    connection: duckdb.DuckDBPyConnection, sql: str, limits: SqlLimits, shape: Shape | None = None
) -> pa.Table:
    """Run one SELECT (or EXPLAIN of one) in a thread, and interrupt it at a signal or after its time.

    Args:
        shape: makes what is run of what it gives; by default all.

    Raises:
        RequestError: it is something else, or takes more than the limits.
        duckdb.Error: it is wrong.
    """
    try:
        return _interruptible(connection, lambda: _result(connection, sql, limits, shape), limits.seconds)
    except duckdb.OutOfMemoryException as error:
        if "max_temp_directory_size" in str(error):
            raise LimitError(TOO_MUCH_DISK.format(gib=limits.disk / GIB)) from None
        raise LimitError(TOO_LARGE.format(gib=limits.memory / GIB)) from None
    except duckdb.Error as error:
        if "Max expression depth" in str(error):
            raise RequestError(TOO_DEEP) from None
        raise


def _result(connection: duckdb.DuckDBPyConnection, sql: str, limits: SqlLimits, shape: Shape | None) -> pa.Table:
    """Check that it is one SELECT, and read its result in parts, as long as there is room."""
    batches, size = [], 0
    try:
        relation = connection.sql(_checked(connection, sql))
        reader = (relation if shape is None else shape(relation)).to_arrow_reader(BATCH)
        for batch in reader:
            batches.append(batch)
            size += batch.nbytes
            if size > limits.memory:
                raise LimitError(TOO_LARGE.format(gib=limits.memory / GIB))
    except OSError as error:  # DuckDB's, after the first part of the result
        if "Out of Memory Error" in str(error):
            raise duckdb.OutOfMemoryException(str(error)) from None
        raise RequestError(f"SQL: {error}") from None
    return pa.Table.from_batches(batches, reader.schema)


def _checked(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """Return what may be run: a SELECT, or EXPLAIN before a text that is a SELECT by itself.

    DuckDB gives no kind for what EXPLAIN explains, and for what a PIVOT stands in (COPY, CREATE TABLE): a SELECT can
    stand in parentheses, these cannot.
    """
    kinds = _kinds(connection, sql)
    explained = EXPLAINED.fullmatch(sql) if kinds == ["EXPLAIN"] else None
    if explained is not None and _kinds(connection, explained[2]) == ["SELECT"]:
        return sql
    if kinds == ["MULTI"]:
        try:
            if _kinds(connection, f"SELECT * FROM (\n{sql.rstrip('; ')}\n)") == ["MULTI"]:
                return sql
        except duckdb.ParserException:
            pass
    if kinds != ["SELECT"]:
        raise RequestError(f"SQL: {', '.join(kinds) or 'nothing'}; {EXPECTED}")
    return sql


def _kinds(connection: duckdb.DuckDBPyConnection, sql: str) -> list[str]:
    return [statement.type.name for statement in connection.extract_statements(sql)]


def _interruptible(connection: duckdb.DuckDBPyConnection, work: Callable[[], T], seconds: float | None) -> T:
    """Call `work` in a thread: while DuckDB works in the main thread, Python handles no signal."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True, name="sql")
    thread.start()
    try:
        thread.join(seconds)
        if thread.is_alive():
            raise LimitError(TOO_LONG.format(seconds=seconds))
    finally:
        if thread.is_alive():
            connection.interrupt()
            thread.join(END)
    if errors:
        raise errors[0]
    return results[0]
