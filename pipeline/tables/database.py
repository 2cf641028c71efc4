"""Connections to DuckDB in memory."""

from typing import Any

import duckdb


def connect(**config: Any) -> duckdb.DuckDBPyConnection:
    """Connect without a progress bar, which DuckDB draws in `python -c`: it takes that for interactive."""
    connection = duckdb.connect(":memory:", config=config)
    connection.execute("SET enable_progress_bar = false")
    return connection
