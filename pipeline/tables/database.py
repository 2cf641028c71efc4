"""DuckDB in memory."""

from typing import Any

import duckdb


def connect(**config: Any) -> duckdb.DuckDBPyConnection:
    """A connection that prints nothing: in `python -c` DuckDB takes itself for interactive, and draws a bar."""
    connection = duckdb.connect(":memory:", config=config)
    connection.execute("SET enable_progress_bar = false")
    return connection
