"""The record of one fault that `microdit verify` names."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "checksum",
    "commit",
    "counts",
    "declaration",
    "fewer",
    "fingerprint",
    "keys",
    "lineage",
    "missing",
    "retry",
    "rows",
    "selection",
    "sidecar",
    "size",
    "stale",
    "stray",
    "table",
    "tar",
    "unit",
    "unreadable",
    "unrepaired",
]

WARNINGS: set[Kind] = {"fewer"}
"""Kinds that are worth a look, and leave a corpus whole."""


@dataclass(frozen=True)
class Problem:
    """One fault: its kind, the object of the corpus that has it, and a sentence for people."""

    kind: Kind
    what: str
    """The object's name under the root of the corpus; of a key that is there twice, `images/SOURCE`."""
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}: {self.detail}"
