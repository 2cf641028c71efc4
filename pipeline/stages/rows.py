"""Read the input samples of a stage, and commit its outputs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

from microdit.pipeline.content.images import BadImage
from microdit.pipeline.corpus.attempt import Attempt, begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row
from microdit.pipeline.stages.stage import Task


def fail_image(made: Iterable[Attempt], row: Row, error: Exception) -> None:
    """Record in all attempts why an image cannot be used: whatever is no `BadImage` is `damaged`."""
    bad = error if isinstance(error, BadImage) else BadImage("damaged", f"{type(error).__name__}: {error}")
    for attempt in made:
        attempt.fail(row.row, row.key, bad.reason, str(bad))


def attempts(stack: ExitStack, corpus: Corpus, task: Task, inputs: Iterable[Commit]) -> dict[str, Attempt]:
    """An attempt for each of a task's columns; what is not committed when the stack ends is dropped."""
    inputs = list(inputs)
    return {
        column: stack.enter_context(begin_attempt(corpus, column, task.ref, inputs, generation))
        for column, generation in task.columns.items()
    }


def samples(rows: Iterable[Row], made: Mapping[str, Attempt], task: Task, column: str) -> Iterator[Row]:
    """The rows of the input `column` to work on; those that failed there, or are set aside, are failed in `made`."""
    for row in rows:
        if task.rows is not None and row.row not in task.rows:
            continue
        reason, detail = "", ""
        if not row.ok:
            reason, detail = "upstream", f"{column}: {row.scalars['reason']}: {row.scalars['detail'] or ''}"
        elif row.row in task.aside:
            reason = task.aside[row.row]
            detail = "the process that worked on this sample alone " + ("died" if reason == "crash" else "did not end")
        if not reason:
            yield row
        for attempt in made.values() if reason else ():
            attempt.fail(row.row, row.key, reason, detail)


def commit_all(made: Mapping[str, Attempt], task: Task, **timings: float) -> list[Commit]:
    """Commit what a task has made; nothing if it was only a trial of some rows."""
    return [attempt.commit(**timings) for attempt in made.values()] if task.rows is None else []


def image_bytes(members: dict[str, bytes]) -> bytes:
    """The image among the members of an images sample, whatever its format.

    Raises:
        BadImage: the sample came without one (docs/corpus.md, section 3.1).
    """
    for extension, data in members.items():
        if extension != "json":
            return data
    raise BadImage("no_picture", "the sample came with its latents, and has no picture")
