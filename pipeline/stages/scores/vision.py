"""Scores by models that want a GPU: `scores/aesthetic`, `embedding`, `clip`, and `nsfw` by a classifier."""

from collections.abc import Iterator, Mapping, Sequence
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
from microdit.pipeline.corpus.attempt import Attempt
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
    ShardRun,
    image_bytes,
    model_failure,
    open_shard,
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
    """One shard in progress, with the captions to compare with by column and row."""

    shard: ShardRun
    captions: Mapping[str, Mapping[int, str]]

    def columns_of(self, row: Row) -> Attempts:
        """Return the columns that take a row: all but those in which its caption has failed."""
        return {
            column: attempt
            for column, attempt in self.shard.attempts.items()
            if column not in self.captions or row.row in self.captions[column]
        }

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the images to work on, which some column takes; the others fail, or have failed."""
        for row in read_rows(self.shard.corpus, self.shard.source):
            if columns := self.columns_of(row):
                yield from usable_rows([row], columns, self.shard.task, IMAGES)

    def fail(self, row: Row, failure: RowFailure) -> None:
        write_row(self.columns_of(row), row, failure)

    def write(self, batch: Sequence[Image], scored: Sequence[Scored | Exception]) -> None:
        for image, scores in zip(batch, scored, strict=True):
            for column, attempt in self.columns_of(image.row).items():
                self.shard.write_column(column, image.row, _outcome(attempt, column, scores))


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
        captions = {c: latest(corpus, name, task.ref) for c, name in self._captions.items() if c in task.columns}
        threads, size = decode_threads(self._threads, self._model.device), self._batches.size
        with open_shard(corpus, task, images, captions) as shard, BatchLine(threads) as line:
            work = ShardScores(shard, {column: _captions(shard, column, commit) for column, commit in captions.items()})
            prepared = prepared_images(line, work.rows(), self._prepare, work.fail, size)
            line.run(chunks(prepared, size), partial(self._score_batch, work), work.write)
            figures = {"encode_seconds": self._batches.seconds - before, "batch": self._batches.size}
            cut = {column: float(self._model.count_cut([*texts.values()])) for column, texts in work.captions.items()}
            for column in cut:
                if (carried := shard.attempts[column].carried) is not None:  # it has counted all of the shard
                    cut[column] = carried.commit.timings.get("cut", 0.0)
            return shard.commit(lambda column: figures | ({"cut": cut[column]} if column in cut else {}))

    def _prepare(self, row: Row) -> np.ndarray:
        """Prepare an image as the model takes it."""
        image: np.ndarray = self._model.prepare(decode(image_bytes(row.members), self._max_pixels).pixels)
        return image

    def _score_batch(self, work: ShardScores, batch: Sequence[Image]) -> list[Scored | Exception]:
        return self._batches.run(partial(self._score, work), batch)

    def _score(self, work: ShardScores, batch: Sequence[Image], size: int) -> list[Scored]:
        columns = [work.columns_of(image.row) for image in batch]
        features = self._model.see([image.image for image in batch], size)
        scored: list[dict[str, np.ndarray]] = [
            dict.fromkeys(asked, seen) for seen, asked in zip(features, columns, strict=True)
        ]
        for column in dict.fromkeys(column for asked in columns for column in asked if column in work.captions):
            texts = [work.captions[column].get(image.row.row, "") for image in batch]
            cosines = (features * self._model.read(texts, size)).sum(1)
            for scores, cosine in zip(scored, cosines, strict=True):
                scores[column] = cosine
        return list(scored)


def _label(options: VisionOptions) -> str | None:
    return options.label if isinstance(options, AestheticScores | NsfwScores) else None


def _captions(shard: ShardRun, column: str, commit: Commit) -> dict[int, str]:
    """Return the captions of a shard by row; rows without one fail in `column`."""
    attempts = {column: shard.attempts[column]}
    rows = usable_rows(read_lines(shard.corpus, commit), attempts, shard.task, commit.column)
    return {row.row: row.scalars["caption"] for row in rows}


def _outcome(attempt: Attempt, column: str, scored: Scored | Exception) -> Outcome:
    if isinstance(scored, Exception):
        return model_failure(scored)
    scores = scored[column]
    if not np.isfinite(scores).all():
        return RowFailure("not_finite", "the model gives NaN, or more than it can hold")
    if attempt.declaration.kind == "tar":
        return Output(members={"npy": array_bytes(scores.astype(np.float16))})
    return Output(dict.fromkeys(attempt.declaration.scalars, float(scores)))  # there is one
