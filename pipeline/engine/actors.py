"""Start and stop the actors that hold a model."""

from dataclasses import dataclass, field
from typing import Any

IDLE_SECONDS = 30.0  # a stage that waits for work longer than this gives its model's place back
CROWDED_SECONDS = 10.0  # the same while another stage has waited as long for a place
PER_ACTOR = 2  # shards with an actor: one running, one waiting, or already decoding (`at_once` of a stage)


@dataclass
class Actor:
    """A stage's actor, and what it has in hand, first in first out."""

    handle: Any
    stage: int
    began: float
    node: str | None = None
    """Where it has its place."""
    ready: bool = False
    refs: list[Any] = field(default_factory=list)
    idle_since: float = 0.0
    alone: bool = False
    """The shard in hand may kill the process: beside it no other one must be blamed, or hide whose fault it is."""
