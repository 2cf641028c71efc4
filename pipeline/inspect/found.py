"""Describe what was found at a place."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Found:
    """Describe a data set: the options that read it, its columns with examples, and what is odd about it."""

    layout: str
    block: dict[str, Any]
    files: int
    bytes: int | None
    estimate: int | None = None
    """Samples in all, by the share of one file that was looked at."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
