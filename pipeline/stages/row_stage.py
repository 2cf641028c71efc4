"""Compute a column sample by sample, on the CPU and without batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest, read_lines
from microdit.pipeline.stages.rows import Outcome, Output, RowFailure, Scalars, ShardRun, open_shard
from microdit.pipeline.stages.stage import ColumnSpec, Task

Compute = Callable[[Row], Scalars]
"""The scalars of a sample from a row of the input; raises RowFailure if it has none."""


class RowStage:
    """A table column whose samples are computed one after the other from one input column.

    Args:
        device: `cpu` if `load` loads a model, else None.
        load: returns the function of a row; picklable, called once per process.
        scalars_only: the function needs no members, so that no pictures are read.
    """

    def __init__(
        self, name: str, spec: ColumnSpec, device: str | None, load: Callable[[], Compute], scalars_only: bool = False
    ):
        self.name, self.device, self.columns = name, device, {name: spec}
        (self._input,) = spec.inputs
        self._load, self._scalars_only = load, scalars_only
        self._compute: Compute | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compute": None}

    def load(self) -> None:
        self._compute = self._compute or self._load()

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        assert self._compute is not None
        source = latest(corpus, self._input, task.ref)
        rows = list(read_lines(corpus, source)) if self._scalars_only else None
        with open_shard(corpus, task, source) as shard:
            return compute_rows(shard, self._compute, rows)


def compute_rows(
    shard: ShardRun, compute: Compute, rows: Iterable[Row] | None = None, timings: Mapping[str, float] | None = None
) -> list[Commit]:
    """Compute and commit a shard row by row; `rows` are those of its input, if they were read already."""
    for row in shard.rows(rows):
        shard.write(row, _outcome(compute, row))
    return shard.commit(lambda column: timings or {})


def _outcome(compute: Compute, row: Row) -> Outcome:
    try:
        return Output(compute(row))
    except RowFailure as failure:
        return failure
