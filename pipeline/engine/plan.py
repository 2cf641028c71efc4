"""The work that is left of a build: found from listings alone, and kept up to date as commits come. No ray here."""

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import NamedTuple, TypeVar

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import failures
from microdit.pipeline.corpus.names import IMAGES, UNITS, ShardId
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.stages.stage import Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One shard for one stage, with the columns to write and the generation of each."""

    stage: int
    source: str
    shard: str
    columns: Mapping[str, int] = field(compare=False)
    again: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    """Columns of which only the rows that failed for these reasons are made again."""

    @property
    def ref(self) -> ShardRef:
        return ShardRef(source=self.source, unit=_unit_of(self.shard), shard=self.shard)


@dataclass(frozen=True)
class UnitJob:
    """One unit to read; in a repair `redo` are the shards to write again, with the generation of each."""

    source: str
    unit: str
    redo: Mapping[str, int] | None = field(default=None, compare=False)
    generation: int = field(default=0, compare=False)
    """Of the unit's own commit."""


class Target(NamedTuple):
    """A column that a stage is to write: its bit in a shard's state, and the bits of its inputs."""

    column: str
    bit: int
    needs: int


class Plan:
    """The units that are not read and the shards that are not made, by stage.

    A shard is one integer: a bit for every column that is committed, and one for every stage in which it is in progress
    (queued or running), so that a million shards of ten columns fit in a few hundred megabytes. The work at the start
    is in a random order: two builds of one corpus then seldom take the same.

    Args:
        sources: `{source: its units}`; commits of other sources of the corpus are left alone.
        columns: the columns to make; None makes all. With `images` among them, units are read.
        retry_failed: take shards and units that were set aside as new.
        redo: shards to make again though they are committed, with everything that is computed from them: by column the
            (source, shard); by `units` the (source, unit) whose own commit is written again.
        rows: shards of which only failed rows are made again, by column. What is computed from them follows if any of
            these rows is good then.
        reasons: for which those rows have failed.

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
        redo: Mapping[str, Collection[ShardId]] | None = None,
        rows: Mapping[str, Collection[ShardId]] | None = None,
        reasons: Sequence[str] = (),
    ):
        self.stages = list(stages)
        self.columns = chosen_columns(stages, columns)
        made = [column for stage in self.stages for column in stage.columns]
        needed = {column for stage in self.stages for spec in stage.columns.values() for column in spec.inputs}
        self._bit = {column: 1 << i for i, column in enumerate(sorted({*made, *needed, IMAGES}))}
        self._busy = [1 << (len(self._bit) + i) for i in range(len(self.stages))]
        self.targets = [
            [
                Target(column, self._bit[column], sum(self._bit[name] for name in {*spec.inputs, IMAGES}))
                for column, spec in stage.columns.items()
                if column in self.columns
            ]
            for stage in self.stages
        ]
        self.ready: list[deque[ShardId]] = [deque() for _ in self.stages]
        self.units: deque[UnitJob] = deque()
        self.units_total = self.units_done = 0
        self.aside: dict[str, set[ShardId]] = {column: set() for column in [UNITS, *self.columns]}
        self.done: Counter[str] = Counter()
        self._state: dict[ShardId, int] = {}
        self._generation: dict[tuple[str, ShardId], int] = {}  # of what is made again
        self._reasons, self._rows = tuple(reasons), set[tuple[str, ShardId]]()  # columns of which only rows are
        self._following: dict[tuple[str, ShardId], list[str]] = {}  # what is made again once they have changed
        self._list(corpus, sources, retry_failed, redo or {}, rows or {})

    def _list(
        self,
        corpus: Corpus,
        sources: Mapping[str, Sequence[str]],
        retry_failed: bool,
        redo: Mapping[str, Collection[ShardId]],
        rows: Mapping[str, Collection[ShardId]],
    ) -> None:
        again = {where for column, places in redo.items() if column != UNITS for where in places}
        again = again.union(*rows.values())
        highest: dict[tuple[str, ShardId], int] = {}
        lock = Lock()

        def listed(source: str, column: str) -> None:
            bit, images = self._bit[column], column == IMAGES
            for where, generation in corpus.listed(column, source):
                if images or where in self._state:
                    with lock:
                        self._state[where] = self._state.get(where, 0) | bit
                if where in again:
                    highest[column, where] = max(highest.get((column, where), 0), generation)

        for source, names in sources.items():
            listed(source, IMAGES)
            with ThreadPoolExecutor(8) as pool:  # they wait for pages of listings, which are not kept
                units = pool.submit(corpus.committed, UNITS, source)
                failed = {c: pool.submit(failures, corpus, c, source) for c in self.aside}
                list(pool.map(partial(listed, source), [c for c in self._bit if c != IMAGES]))
            self._again({where for where in again if where[0] == source}, redo, rows, highest)
            self._list_units(source, names, units.result(), redo)
            for column, records in failed.items():
                for where in records.result():
                    done = where in units.result() if column == UNITS else self._has(where, column)
                    if not done and not retry_failed and (column, where) not in self._generation:
                        self.aside[column].add(where)
        for shard, state in self._state.items():
            self.done.update(column for column in self.columns if state & self._bit[column])
            self._consider(shard)
        self.units = deque(_shuffled(unit for unit in self.units if (unit.source, unit.unit) not in self.aside[UNITS]))
        self.ready = [deque(_shuffled(queue)) for queue in self.ready]

    def _again(
        self,
        shards: Collection[ShardId],
        redo: Mapping[str, Collection[ShardId]],
        rows: Mapping[str, Collection[ShardId]],
        highest: Mapping[tuple[str, ShardId], int],
    ) -> None:
        """Mark the columns to make again, and those computed from them, as not committed.

        What is computed from columns of which only rows are made again stays committed until they have changed.
        """
        specs = {column: spec for stage in self.stages for column, spec in stage.columns.items()}
        order = [IMAGES]
        while rest := [c for c in self._bit if c not in order]:
            order += [c for c in rest if c not in specs or set(specs[c].inputs) <= {*order, IMAGES}] or rest
        for where in shards:
            old: set[str] = set()
            changing: dict[str, set[str]] = {}  # by column those of its inputs that may change
            for column in order:
                inputs = {IMAGES, *specs[column].inputs} if column in specs else set()
                follows = set().union(*(changing[name] for name in inputs & changing.keys()))
                wholly = where in redo.get(column, ()) or bool(old & inputs)
                in_rows = not wholly and where in rows.get(column, ()) and (column, where) in highest
                if not (wholly or in_rows or follows):
                    continue
                if (column, where) in highest:
                    self._generation[column, where] = highest[column, where] + 1
                if wholly:
                    old.add(column)
                if in_rows:
                    self._rows.add((column, where))
                if (wholly or in_rows) and where in self._state:
                    self._state[where] &= ~self._bit[column]
                if not wholly:
                    for name in follows:
                        self._following.setdefault((name, where), []).append(column)
                    changing[column] = follows | ({column} if in_rows else set())

    def _list_units(
        self, source: str, names: Sequence[str], units: Mapping[ShardId, int], redo: Mapping[str, Collection[ShardId]]
    ) -> None:
        shards: dict[str, dict[str, int]] = defaultdict(dict)
        for (column, (of, shard)), generation in self._generation.items():
            if column == IMAGES and of == source:
                shards[_unit_of(shard)][shard] = generation
        damaged = {unit for of, unit in redo.get(UNITS, ()) if of == source}
        self.units_total += len(names)
        for name in names:
            committed, again = (source, name) in units, name in shards or name in damaged
            self.units_done += committed and not again
            if IMAGES in self.columns and (again or not committed):
                generation = units[source, name] + 1 if name in damaged and committed else units.get((source, name), 0)
                self.units.append(UnitJob(source, name, shards.get(name, {}) if again else None, generation))

    def _has(self, shard: ShardId, column: str) -> bool:
        return bool(self._state.get(shard, 0) & self._bit[column])

    def _todo(self, stage: int, shard: ShardId) -> dict[str, int]:
        state = self._state[shard]
        return {
            column: self._generation.get((column, shard), 0)
            for column, bit, needs in self.targets[stage]
            if not state & bit and state & needs == needs and shard not in self.aside[column]
        }

    def _consider(self, shard: ShardId) -> None:
        for stage, busy in enumerate(self._busy):
            if not self._state[shard] & busy and self._todo(stage, shard):
                self._state[shard] |= busy
                self.ready[stage].append(shard)

    # -- the driver's side ---------------------------------------------------------------------------------------------

    @property
    def shards(self) -> int:
        """Return how many shards of images are committed."""
        return len(self._state)

    def empty(self) -> bool:
        """Return True if nothing can be done now."""
        return not self.units and not any(self.ready)

    def take(self, stage: int) -> Job | None:
        """Take the next shard for a stage; it counts as in progress until `release`, `requeue` or `set_aside`."""
        while self.ready[stage]:
            source, shard = where = self.ready[stage].popleft()
            if columns := self._todo(stage, where):
                again = {column: self._reasons for column in columns if (column, where) in self._rows}
                return Job(stage, source, shard, columns, again)
            self._state[where] &= ~self._busy[stage]
        return None

    def take_unit(self, may_take: Callable[[UnitJob], bool]) -> UnitJob | None:
        """Take the next unit that may be read now."""
        for index, unit in enumerate(self.units):
            if may_take(unit):
                del self.units[index]
                return unit
        return None

    def leave(self, source: str) -> None:
        """Leave the units of a source unread."""
        self.units = deque(unit for unit in self.units if unit.source != source)

    def requeue(self, job: Job | UnitJob) -> None:
        """Put a job that was not done back at the head of its queue."""
        if isinstance(job, UnitJob):
            self.units.appendleft(job)
        else:
            self.ready[job.stage].appendleft((job.source, job.shard))

    def committed(self, source: str, shard: str, column: str) -> bool:
        """Note a commit and queue the stages that waited for it; return False if it was known."""
        where = (source, shard)
        state = self._state.get(where, 0)
        if state & self._bit[column]:
            return False
        self._state[where] = state | self._bit[column]
        self.done[column] += 1
        self.aside.get(column, set()).discard(where)
        for follower in self._following.pop((column, where), ()):
            self._rows.discard((follower, where))
            if self._has(where, follower):
                self._state[where] &= ~self._bit[follower]
                self.done[follower] -= 1
        self._consider(where)
        return True

    def unchanged(self, source: str, shard: str, column: str) -> None:
        """Note that rows were made again and failed again: the column stays, and what is computed from it."""
        where = (source, shard)
        self._following.pop((column, where), None)
        self._rows.discard((column, where))
        self._state[where] |= self._bit[column]
        self.done[column] += 1
        self._consider(where)

    def unit_committed(self, source: str, unit: str) -> None:
        """Note a unit's own commit."""
        self.units_done += 1
        self.aside[UNITS].discard((source, unit))

    def release(self, job: Job) -> None:
        """End a job, made or set aside; if more of the shard became ready meanwhile, queue it again."""
        shard = (job.source, job.shard)
        self._state[shard] &= ~self._busy[job.stage]
        self._consider(shard)

    def set_aside(self, job: Job | UnitJob) -> tuple[str, ...]:
        """Give a job up; return the columns that it should have made (`units` for a unit)."""
        if isinstance(job, UnitJob):
            self.aside[UNITS].add((job.source, job.unit))
            return (UNITS,)
        left = tuple(c for c in job.columns if not self._has((job.source, job.shard), c))
        for column in left:
            self.aside[column].add((job.source, job.shard))
        self.release(job)
        return left

    def upstream(self, stage: int) -> set[int]:
        """Return the stages that a stage waits for, directly or not."""
        makers = {target.column: i for i, targets in enumerate(self.targets) for target in targets}
        upstream: set[int] = set()
        queue = [stage]
        while queue:
            current = queue.pop()
            specs = [self.stages[current].columns[target.column] for target in self.targets[current]]
            needs = {name for spec in specs for name in spec.inputs}
            new = {makers[name] for name in needs & makers.keys()} - upstream - {stage}
            upstream |= new
            queue.extend(new)
        return upstream

    def downstream_first(self) -> list[int]:
        """Return the stages in the order in which they are served: the furthest from the sources first."""
        return sorted(range(len(self.stages)), key=lambda stage: (-len(self.upstream(stage)), stage))


def chosen_columns(stages: Sequence[Stage], columns: Collection[str] | None) -> list[str]:
    """Name the columns that a build makes: images and those of its stages, or of these the ones asked for.

    Raises:
        RequestError: one was asked for that neither is `images` nor made by a stage.
    """
    made = [IMAGES, *(column for stage in stages for column in stage.columns)]
    for column in columns or ():
        if column not in made:
            raise RequestError(f"column {column!r}: this config makes no such column; it makes: {', '.join(made)}")
    return [column for column in made if columns is None or column in columns]


def _unit_of(shard: str) -> str:
    return shard.rpartition("-")[0]


def _shuffled(items: Iterable[T]) -> list[T]:
    shuffled = list(items)
    random.shuffle(shuffled)
    return shuffled
