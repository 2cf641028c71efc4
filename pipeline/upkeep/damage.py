"""`microdit build --repair`: what of a corpus must be made again, found by reading all of it."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from microdit.pipeline.base.errors import DamagedError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, IMAGES, OBJECT, UNITS, ShardId
from microdit.pipeline.upkeep.verify import verify


@dataclass
class Damage:
    """What `verify` found, as work."""

    redo: dict[str, set[ShardId]] = field(default_factory=lambda: defaultdict(set))
    """By column the (source, shard) that are made again; `units`: (source, unit) whose commit is written again."""
    beyond: list[dict[str, str]] = field(default_factory=list)
    """Problems of `verify` that no rebuilding mends."""


def damage(corpus: Corpus, progress: Callable[[int, int], None] | None = None) -> Damage:
    """Read everything that is committed (`verify`) and say what must be made again.

    Cached tables that are damaged are removed: whoever needs one makes it.
    """
    found = Damage()
    for problem in verify(corpus, progress)["problems"]:
        kind, what = problem["kind"], problem["what"]
        if kind == "table":
            corpus.store.delete([what])
        elif kind in ("declaration", "stray", "selection"):
            found.beyond.append(problem)
        elif kind == "unit" and (match := COMMIT.fullmatch(what)):
            _unit(corpus, found, match[2], match[3], int(match[4]))
        elif match := COMMIT.fullmatch(what) or OBJECT.fullmatch(what):
            found.redo[match[1]].add((match[2], match[3]))
        else:
            found.beyond.append(problem)
    return found


def _unit(corpus: Corpus, found: Damage, source: str, unit: str, generation: int) -> None:
    """A unit that is not what its commit says: it is read again, and the shards that are gone are written again."""
    found.redo[UNITS].add((source, unit))
    try:
        record = corpus.unit(source, unit, generation)
    except DamagedError:
        return  # which of its shards are missing is seen when it is read
    there = corpus.committed(IMAGES, source)
    found.redo[IMAGES] |= {(source, shard) for shard in record.shards if (source, shard) not in there}
