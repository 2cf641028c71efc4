"""What a build has still to do: found from listings alone, and kept up to date as commits come. No ray here."""

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline.corpus import Corpus, ShardRef
from pipeline.errors import RequestError
from pipeline.failures import failures
from pipeline.records import UNITS
from pipeline.stages import IMAGES, Stage


@dataclass(frozen=True)
class Job:
    """One shard for one stage: write just these columns of it."""

    stage: int
    source: str
    shard: str
    columns: tuple[str, ...] = field(compare=False)

    @property
    def ref(self) -> ShardRef:
        return ShardRef(source=self.source, unit=self.shard.rpartition("-")[0], shard=self.shard)


@dataclass(frozen=True)
class UnitJob:
    """One unit to read."""

    source: str
    unit: str


class Plan:
    """The units that are not read and the shards that are not made, by stage.

    A shard is one integer: a bit for every column that is committed, and one for every stage that has it in hand
    (queued or running), so that a million shards of ten columns fit in a few hundred megabytes.

    Args:
        sources: `{source: its units}`; commits of other sources of the corpus are left alone.
        columns: what to make; None makes all. With `images` among them, units are read.
        retry_failed: take what was set aside as new.

    Raises:
        RequestError: a column that neither is `images` nor made by a stage.
    """

    def __init__(
        self,
        corpus: Corpus,
        sources: Mapping[str, Sequence[str]],
        stages: Sequence[Stage],
        columns: Collection[str] | None = None,
        retry_failed: bool = False,
    ):
        self.stages = list(stages)
        made = [column for stage in self.stages for column in stage.columns]
        for column in columns or ():
            if column != IMAGES and column not in made:
                raise RequestError(
                    f"column {column!r}: this config makes no such column; it makes: {IMAGES}, {', '.join(made)}"
                )
        self.columns = [column for column in [IMAGES, *made] if columns is None or column in columns]
        needed = {column for stage in self.stages for spec in stage.columns.values() for column in spec.inputs}
        self._bit = {column: 1 << i for i, column in enumerate(sorted({*made, *needed, IMAGES}))}
        self._busy = [1 << (len(self._bit) + i) for i in range(len(self.stages))]
        self.targets = [
            [
                (column, self._bit[column], sum(self._bit[name] for name in {*spec.inputs, IMAGES}))
                for column, spec in stage.columns.items()
                if column in self.columns
            ]
            for stage in self.stages
        ]
        self.ready: list[deque[tuple[str, str]]] = [deque() for _ in self.stages]
        self.units: deque[UnitJob] = deque()
        self.units_total = self.units_done = 0
        self.aside: dict[str, set[tuple[str, str]]] = {column: set() for column in [UNITS, *self.columns]}
        self.done: Counter[str] = Counter()
        self._state: dict[tuple[str, str], int] = {}
        self._list(corpus, sources, retry_failed)

    def _list(self, corpus: Corpus, sources: Mapping[str, Sequence[str]], retry_failed: bool) -> None:
        listed = [column for column in self._bit if column != IMAGES]
        with ThreadPoolExecutor(8) as pool:
            for source, names in sources.items():
                units = pool.submit(corpus.committed, UNITS, source)
                failed = {c: pool.submit(failures, corpus, c, source) for c in self.aside}
                found = {c: pool.submit(corpus.committed, c, source) for c in listed}
                self._state |= dict.fromkeys(corpus.committed(IMAGES, source), self._bit[IMAGES])
                for column, listing in found.items():
                    for shard in listing.result().keys() & self._state.keys():
                        self._state[shard] |= self._bit[column]
                self.units_total += len(names)
                self.units_done += sum((source, name) in units.result() for name in names)
                for column, records in failed.items():
                    for where in records.result():
                        done = where in units.result() if column == UNITS else self._has(where, column)
                        if not done and not retry_failed:
                            self.aside[column].add(where)
                if IMAGES in self.columns:
                    left = [name for name in names if (source, name) not in units.result()]
                    self.units.extend(UnitJob(source, unit) for unit in left if (source, unit) not in self.aside[UNITS])
        for shard, state in sorted(self._state.items()):
            self.done.update(column for column in self.columns if state & self._bit[column])
            self._consider(shard)

    def _has(self, shard: tuple[str, str], column: str) -> bool:
        return bool(self._state.get(shard, 0) & self._bit[column])

    def _todo(self, stage: int, shard: tuple[str, str]) -> tuple[str, ...]:
        state = self._state[shard]
        return tuple(
            column
            for column, bit, needs in self.targets[stage]
            if not state & bit and state & needs == needs and shard not in self.aside[column]
        )

    def _consider(self, shard: tuple[str, str]) -> None:
        for stage, busy in enumerate(self._busy):
            if not self._state[shard] & busy and self._todo(stage, shard):
                self._state[shard] |= busy
                self.ready[stage].append(shard)

    # -- asked and told by the engine ------------------------------------------------------------------------------

    @property
    def shards(self) -> int:
        """How many shards of images are committed."""
        return len(self._state)

    def empty(self) -> bool:
        """True if nothing can be done now."""
        return not self.units and not any(self.ready)

    def take(self, stage: int) -> Job | None:
        """The next shard for a stage; it is in hand until `release`, `requeue` or `set_aside`."""
        while self.ready[stage]:
            source, shard = where = self.ready[stage].popleft()
            if columns := self._todo(stage, where):
                return Job(stage, source, shard, columns)
            self._state[where] &= ~self._busy[stage]
        return None

    def requeue(self, job: Job | UnitJob) -> None:
        """A job was not done: it is handed out again."""
        if isinstance(job, UnitJob):
            self.units.append(job)
        else:
            self.ready[job.stage].append((job.source, job.shard))

    def committed(self, source: str, shard: str, column: str) -> bool:
        """A commit was made: what waited for it is ready now. False if it was known."""
        where = (source, shard)
        state = self._state.get(where, 0)
        if state & self._bit[column]:
            return False
        self._state[where] = state | self._bit[column]
        self.done[column] += 1
        self.aside.get(column, set()).discard(where)
        self._consider(where)
        return True

    def unit_committed(self, source: str, unit: str) -> None:
        self.units_done += 1
        self.aside[UNITS].discard((source, unit))

    def release(self, job: Job) -> None:
        """A job came to its end, made or set aside; if more of the shard became ready meanwhile, it is queued again."""
        shard = (job.source, job.shard)
        self._state[shard] &= ~self._busy[job.stage]
        self._consider(shard)

    def set_aside(self, job: Job | UnitJob) -> tuple[str, ...]:
        """Give a job up; returns the columns that it should have made (`units` for a unit)."""
        if isinstance(job, UnitJob):
            self.aside[UNITS].add((job.source, job.unit))
            return (UNITS,)
        left = tuple(c for c in job.columns if not self._has((job.source, job.shard), c))
        for column in left:
            self.aside[column].add((job.source, job.shard))
        self.release(job)
        return left

    def upstream(self, stage: int) -> set[int]:
        """The stages that a stage waits for, directly or not."""
        makers = {column: i for i, targets in enumerate(self.targets) for column, _, _ in targets}
        found: set[int] = set()
        queue = [stage]
        while queue:
            current = queue.pop()
            needs = {
                name for column, _, _ in self.targets[current] for name in self.stages[current].columns[column].inputs
            }
            new = {makers[name] for name in needs & makers.keys()} - found - {stage}
            found |= new
            queue.extend(new)
        return found

    def downstream_first(self) -> list[int]:
        """The stages in the order in which they are served: what is furthest from the source first."""
        return sorted(range(len(self.stages)), key=lambda stage: (-len(self.upstream(stage)), stage))
