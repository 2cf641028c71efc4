"""Read the input rows of a stage, and write and commit its outputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from microdit.pipeline.content.images import BadImage
from microdit.pipeline.corpus.attempt import Attempt, begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.reasons import named_by
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, read_rows
from microdit.pipeline.stages.stage import Task

Attempts = Mapping[str, Attempt]
"""The attempt of each column."""
Scalars = Mapping[str, str | int | float]


class RowFailure(Exception):
    """Why a sample fails in a column: `reason` is a short code to group by, the text one line for a person."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Output:
    """Stored output of a sample in a column: scalars in the sidecar, and members in the tar, `{extension: bytes}`."""

    scalars: Scalars = field(default_factory=dict)
    members: Mapping[str, bytes] = field(default_factory=dict)


Outcome = Output | RowFailure


def image_failure(error: Exception) -> RowFailure:
    """Name the reason why an image cannot be used: that of a `BadImage`, or `damaged`."""
    if isinstance(error, BadImage):
        return RowFailure(error.reason, str(error))
    return RowFailure("damaged", f"{type(error).__name__}: {error}")


def model_failure(error: Exception) -> RowFailure:
    """Record an exception that a model raises for a sample alone."""
    return RowFailure("error", f"{type(error).__name__}: {error}")


def image_bytes(members: dict[str, bytes]) -> bytes:
    """Return the image among the members of an images sample, whatever its format.

    Raises:
        BadImage: the sample came without one (docs/reference/corpus.md, section 3.1).
    """
    for extension, data in members.items():
        if extension != "json":
            return data
    raise BadImage("no_picture", "the sample came with its latents, and has no picture")


def usable_rows(rows: Iterable[Row], attempts: Attempts, task: Task, column: str) -> Iterator[Row]:
    """List the rows of the input `column` to work on. Those that failed there, or are set aside, fail in `attempts`."""
    for row in rows:
        if task.rows is not None and row.row not in task.rows:
            continue
        if attempts and all(attempt.carries(row.row) for attempt in attempts.values()):
            continue
        if not row.ok:
            detail = f"{column}: {row.scalars['reason']}: {row.scalars['detail'] or ''}"
            write_row(attempts, row, RowFailure("upstream", detail))
        elif row.row in task.aside:
            reason = task.aside[row.row]
            end = "died" if reason == "crash" else "did not end"
            write_row(attempts, row, RowFailure(reason, f"the process that worked on this sample alone {end}"))
        else:
            yield row


def write_row(attempts: Attempts, row: Row, outcome: Outcome) -> None:
    """Add a sample's output, or its failure, to each of the attempts."""
    for attempt in attempts.values():
        if isinstance(outcome, RowFailure):
            attempt.fail(row.row, row.key, outcome.reason, str(outcome))
        else:
            attempt.add(row.row, row.key, outcome.members, **outcome.scalars)


@dataclass(frozen=True)
class ShardRun:
    """One shard of a stage in progress.

    Rows may fail in several threads at once, and are added by one thread, in any order: a commit sorts them.
    """

    corpus: Corpus
    task: Task
    source: Commit
    """Of the input whose rows the stage works on."""
    attempts: Attempts

    def rows(self, rows: Iterable[Row] | None = None) -> Iterator[Row]:
        """List the rows of the input to work on, from `rows` if they were read already; the others fail."""
        if rows is None:
            rows = read_rows(self.corpus, self.source)
        return usable_rows(rows, self.attempts, self.task, self.source.column)

    def write(self, row: Row, outcome: Outcome) -> None:
        """Write a sample in all columns."""
        write_row(self.attempts, row, outcome)

    def write_column(self, column: str, row: Row, outcome: Outcome) -> None:
        """Write a sample in one column."""
        write_row({column: self.attempts[column]}, row, outcome)

    def commit(self, timings: Callable[[str], Mapping[str, float]] = lambda column: {}) -> list[Commit]:
        """Commit each column with its `timings`; nothing if the task was only a trial of some rows.

        A column of which rows were made again, and none of them is good now, stays as it is.
        """
        if self.task.rows is not None:
            return []
        gained = {column: attempt for column, attempt in self.attempts.items() if attempt.has_gained}
        return [attempt.commit(**timings(column)) for column, attempt in gained.items()]


@contextmanager
def open_shard(
    corpus: Corpus, task: Task, source: Commit, further: Mapping[str, Commit] | None = None
) -> Iterator[ShardRun]:
    """Begin an attempt for each of a task's columns; what is not committed when the block ends is dropped.

    Args:
        source: the input whose rows the stage works on.
        further: a second input of a column, by column.
    """
    attempts: dict[str, Attempt] = {}
    with ExitStack() as stack:
        for column, generation in task.columns.items():
            inputs = [source, *([further[column]] if further and column in further else ())]
            attempts[column] = stack.enter_context(begin_attempt(corpus, column, task.ref, inputs, generation))
            if reasons := task.again.get(column):
                before = corpus.commit(column, task.ref.source, task.ref.shard, generation - 1)
                attempts[column].carry_over(before, partial(named_by, names=reasons))
        yield ShardRun(corpus, task, source, attempts)
