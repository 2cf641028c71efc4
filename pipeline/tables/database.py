"""Connections to DuckDB in memory, and what a query may take of the machine."""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Any

import duckdb

GIB = 1 << 30
MOST_DEPTH = 250
"""Of nested expressions: what DuckDB and Python's JSON parser recurse through with room to spare."""


def _memory() -> int:
    """Return 8 GiB, or half of the machine's memory if that is less."""
    return min(8 * GIB, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


def _disk() -> int:
    """Return 32 GiB, or half of what is free in the temporary folder if that is less."""
    return min(32 * GIB, shutil.disk_usage(tempfile.gettempdir()).free // 2)


@dataclass(frozen=True)
class SqlLimits:
    """Limits of one query: bytes of memory (its result as much again), bytes of temporary files, and seconds."""

    memory: int = field(default_factory=_memory)
    disk: int = field(default_factory=_disk)
    seconds: float | None = None

    @property
    def settings(self) -> dict[str, str]:
        """DuckDB's settings for them."""
        return {"memory_limit": f"{self.memory}B", "max_temp_directory_size": f"{self.disk}B"}


def connect(**config: Any) -> duckdb.DuckDBPyConnection:
    """Connect without a progress bar, which DuckDB draws in `python -c`: it takes that for interactive."""
    connection = duckdb.connect(":memory:", config={"max_expression_depth": MOST_DEPTH} | config)
    connection.execute("SET enable_progress_bar = false")
    return connection
