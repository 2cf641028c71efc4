"""Scores by models that want a GPU: `scores/aesthetic`, `embedding`, `clip`, and `nsfw` by a classifier."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from microdit.model.device import best_device
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.scores import AestheticScores, ClipScores, EmbeddingScores, NsfwScores, scorer_of
from microdit.pipeline.content.images import decode
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import Attempt, begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, column_kind
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest, read_lines, read_rows
from microdit.pipeline.stages.batch_line import BatchLine, PreparedImage, decode_threads, prepared_images
from microdit.pipeline.stages.encoding import Batches
from microdit.pipeline.stages.identity import absolute, vision_identity
from microdit.pipeline.stages.rows import (
    Attempts,
    Outcome,
    Output,
    RowFailure,
    commit_all,
    image_bytes,
    model_failure,
    usable_rows,
    write_row,
)
from microdit.pipeline.stages.stage import ColumnSpec, Task

VisionOptions = AestheticScores | ClipScores | EmbeddingScores | NsfwScores
VisionTask = Literal["classify", "aesthetic", "embed", "compare"]

TASKS: dict[type, VisionTask] = {
    AestheticScores: "aesthetic",
    ClipScores: "compare",
    EmbeddingScores: "embed",
    NsfwScores: "classify",
}
Image = PreparedImage[np.ndarray]
Scored = Mapping[str, np.ndarray]
"""By column a score, or features (width,)."""


@dataclass(frozen=True)
class ShardScores:
    """One shard in progress: the attempt of each column, and by column and row the captions to compare with."""

    attempts: Attempts
    captions: Mapping[str, Mapping[int, str]]

    def columns_of(self, row: Row) -> dict[str, Attempt]:
        """The columns that take a row: all but those in which its caption has failed."""
        return {
            column: attempt
            for column, attempt in self.attempts.items()
            if column not in self.captions or row.row in self.captions[column]
        }

    def usable(self, rows: Iterable[Row], task: Task) -> Iterator[Row]:
        """The rows of the images to work on, which some column takes; the others fail, or have failed."""
        for row in rows:
            if columns := self.columns_of(row):
                yield from usable_rows([row], columns, task, IMAGES)

    def fail(self, row: Row, failure: RowFailure) -> None:
        write_row(self.columns_of(row), row, failure)

    def write(self, batch: Sequence[Image], scored: Sequence[Scored | Exception]) -> None:
        for image, scores in zip(batch, scored, strict=True):
            for column, attempt in self.columns_of(image.row).items():
                write_row({column: attempt}, image.row, _outcome(attempt, column, scores))


class VisionScores:
    """The columns of one model: one, or of `clip` one for each captions column.

    A table has the score under the scorer's name; an embedding is a member `<key>.npy`, float16 (width,), of unit
    length. Batches never cross shards and all have one shape, so that a shard's bytes can be reproduced.
    """

    device = "gpu"

    def __init__(self, name: str, columns: Mapping[str, VisionOptions], max_pixels: int, resources: Resources):
        self.name, self._max_pixels = name, max_pixels
        self._threads, self._batches = resources.decode_threads, Batches(resources.scores_batch)
        self.columns: dict[str, ColumnSpec] = {}
        self._captions: dict[str, str] = {}
        for column, options in columns.items():
            self._options, self._task = options, TASKS[type(options)]
            model = vision_identity(column, self._task, options.model, _label(options), options.revision)
            # the worker loads the declared revision, even if the branch has moved since
            self._revision = model.get("revision")
            scorer, inputs = scorer_of(column), [IMAGES]
            if isinstance(options, ClipScores):
                self._captions[column] = f"captions/{options.captions}"
                inputs.append(self._captions[column])
            stage = {"stage": f"scores/{scorer}", "version": 1, **options.model_dump(exclude={"model"})}
            stage |= {"name": options.model, "model": model}
            scalars = {scorer: "float32"} if column_kind(column) == "table" else {}
            self.columns[column] = ColumnSpec(stage, scalars, tuple(inputs))
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def load(self) -> None:
        from microdit.model.pretrained.vision import load_vision_model

        if self._model is None:
            self._model = load_vision_model(
                absolute(self._options.model),
                self._task,
                label=_label(self._options),
                revision=self._revision,
                device=best_device(),
            )

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        images, before = latest(corpus, IMAGES, task.ref), self._batches.seconds
        with ExitStack() as stack:
            shard = self._begin(stack, corpus, task, images)
            line = stack.enter_context(BatchLine(decode_threads(self._threads, self._model.device)))
            size = self._batches.size
            rows = shard.usable(read_rows(corpus, images), task)
            prepared = prepared_images(line, rows, self._prepare, shard.fail, size)
            line.run(chunks(prepared, size), lambda batch: self._score_batch(shard, batch), shard.write)
            figures = {"encode_seconds": self._batches.seconds - before, "batch": self._batches.size}
            return commit_all(shard.attempts, task, lambda column: figures)

    def _begin(self, stack: ExitStack, corpus: Corpus, task: Task, images: Commit) -> ShardScores:
        """Begin the attempts, and read the captions; rows without a caption fail in the column that needs it."""
        commits = {c: latest(corpus, name, task.ref) for c, name in self._captions.items() if c in task.columns}
        attempts: dict[str, Attempt] = {}
        for column, generation in task.columns.items():
            inputs = [images, *([commits[column]] if column in commits else ())]
            attempts[column] = stack.enter_context(begin_attempt(corpus, column, task.ref, inputs, generation))
        captions = {
            column: {
                row.row: row.scalars["caption"]
                for row in usable_rows(read_lines(corpus, commit), {column: attempts[column]}, task, commit.column)
            }
            for column, commit in commits.items()
        }
        return ShardScores(attempts, captions)

    def _prepare(self, row: Row) -> np.ndarray:
        """An image as the model takes it."""
        image: np.ndarray = self._model.prepare(decode(image_bytes(row.members), self._max_pixels).pixels)
        return image

    def _score_batch(self, shard: ShardScores, batch: Sequence[Image]) -> list[Scored | Exception]:
        return self._batches.run(partial(self._score, shard), batch)

    def _score(self, shard: ShardScores, batch: Sequence[Image], size: int) -> list[Scored]:
        columns = [shard.columns_of(image.row) for image in batch]
        features = self._model.see([image.image for image in batch], size)
        scored: list[dict[str, np.ndarray]] = [
            dict.fromkeys(asked, seen) for seen, asked in zip(features, columns, strict=True)
        ]
        for column in dict.fromkeys(column for asked in columns for column in asked if column in shard.captions):
            texts = [shard.captions[column].get(image.row.row, "") for image in batch]
            cosines = (features * self._model.read(texts, size)).sum(1)
            for scores, cosine in zip(scored, cosines, strict=True):
                scores[column] = cosine
        return list(scored)


def _label(options: VisionOptions) -> str | None:
    return options.label if isinstance(options, AestheticScores | NsfwScores) else None


def _outcome(attempt: Attempt, column: str, scored: Scored | Exception) -> Outcome:
    if isinstance(scored, Exception):
        return model_failure(scored)
    scores = scored[column]
    if not np.isfinite(scores).all():
        return RowFailure("not_finite", "the model gives NaN, or more than it can hold")
    if attempt.declaration.kind == "tar":
        return Output(members={"npy": array_bytes(scores.astype(np.float16))})
    return Output(dict.fromkeys(attempt.declaration.scalars, float(scores)))  # there is one
