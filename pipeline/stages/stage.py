"""Define what a stage is: one shard in, one shard of each of its columns out.

Stages import and run without Ray. Those that hold a model import torch when they load it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, ShardRef


def seed_of(column: str, source: str, key: str) -> int:
    """Compute the seed of a sample in a column: 63 bits of the SHA-256 of `<column> LF <source>/<key>`."""
    digest = hashlib.sha256(f"{column}\n{source}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class ColumnSpec:
    """Specification of a column: the stage that makes it, its scalars, and the columns that it reads."""

    stage: dict[str, Any]
    """Determines the numbers: name, version, options, model hashes (docs/reference/corpus.md, section 5)."""
    scalars: dict[str, str] = field(default_factory=dict)
    """The sidecar's own columns, by type name."""
    inputs: tuple[str, ...] = ()
    """The columns that it is computed from."""


@dataclass(frozen=True)
class Task:
    """One shard for a stage."""

    ref: ShardRef
    columns: Mapping[str, int]
    """The columns to write, and the generation of each: 0, and in a repair the one after the highest."""
    aside: Mapping[int, str] = field(default_factory=dict)
    """Rows that killed the processes that worked on them, and the reason: they fail with it, untouched."""
    rows: range | None = None
    """Work on these rows alone and commit nothing: a search for the row that kills the process."""
    again: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Columns of which only the rows that failed for these reasons are made again; the others are carried over."""


@dataclass(frozen=True)
class UnitTask:
    """One unit for ingest."""

    unit: str
    redo: Mapping[str, int] | None = None
    """In a repair the shards that are written again, and the generation of each; otherwise None."""
    generation: int = 0
    """Of the unit's own commit."""
    isolated: bool = False
    """Decode in a separate process: this unit killed the process that read it."""


class Stage(Protocol):
    """Makes one or several columns of a shard. Picklable, and cheap to make: models come with `load`.

    A stage with an attribute `at_once = 2` may be run by two threads, each with a shard.
    """

    name: str
    columns: dict[str, ColumnSpec]

    @property
    def device(self) -> str | None:
        """Device of its model: `gpu`, on a GPU if there is one; `cpu`, always on the CPU. None: it holds no model."""

    def load(self) -> None:
        """Load the models, once per process."""

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        """Write the task's columns from the latest commits of their inputs; one commit each.

        Raises:
            FileNotFoundError: an input of the shard is not committed.
        """
