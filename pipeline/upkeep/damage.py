"""`microdit build --repair`: read all of a corpus, and list what must be made again."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from microdit.pipeline.base.errors import DamagedError, RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import COMMIT, IMAGES, OBJECT, UNITS, ShardId
from microdit.pipeline.upkeep.problem import Problem
from microdit.pipeline.upkeep.verify import verify


@dataclass
class Damage:
    """The problems of a corpus as work for a build."""

    redo: dict[str, set[ShardId]] = field(default_factory=lambda: defaultdict(set))
    """By column the (source, shard) to make again; under `units` the (source, unit) whose commit is written again."""
    beyond: list[Problem] = field(default_factory=list)
    """Problems that no rebuilding mends."""


def damage(corpus: Corpus, progress: Callable[[int, int, int], None] | None = None) -> Damage:
    """Read everything that is committed (`verify`), and list what must be made again.

    Damaged cached tables are deleted: they are made again when they are needed.

    Args:
        progress: as of `verify`.

    Raises:
        RequestError: something cannot be read, which is no damage.
    """
    result = Damage()
    problems = verify(corpus, progress).problems
    _refuse_unreadable(corpus, [problem for problem in problems if problem.kind == "unreadable"])
    for problem in problems:
        if problem.kind == "table":
            corpus.store.delete([problem.what])
        elif problem.kind in ("declaration", "stray", "selection"):
            result.beyond.append(problem)
        elif problem.kind == "unit" and (match := COMMIT.fullmatch(problem.what)):
            _redo_unit(corpus, result, match[2], match[3], int(match[4]))
        elif match := COMMIT.fullmatch(problem.what) or OBJECT.fullmatch(problem.what):
            result.redo[match[1]].add((match[2], match[3]))
        else:
            result.beyond.append(problem)
    return result


def _refuse_unreadable(corpus: Corpus, problems: list[Problem]) -> None:
    """Refuse to make again what may be sound: a storage that refuses or fails says nothing about the bytes.

    Raises:
        RequestError: there are such problems.
    """
    if problems:
        raise RequestError(
            f"corpus {corpus.url}: {len(problems):,} objects cannot be read, the first is {problems[0].what} "
            f"({problems[0].detail}). That is no damage, so nothing is made again: mend the access or the storage and "
            "run it again; an object that is lost for good may be deleted, and is then made again"
        )


def _redo_unit(corpus: Corpus, result: Damage, source: str, unit: str, generation: int) -> None:
    """Add a unit that is not what its commit says, and those of its shards that are missing."""
    result.redo[UNITS].add((source, unit))
    try:
        record = corpus.unit(source, unit, generation)
    except DamagedError:
        return  # its missing shards are known once it is read again
    committed = corpus.committed(IMAGES, source)
    result.redo[IMAGES] |= {(source, shard) for shard in record.shards if (source, shard) not in committed}
