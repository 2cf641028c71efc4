"""Scores by models that want a GPU: `scores/aesthetic`, `embedding`, `clip`, and `nsfw` by a classifier.

committed tar --a thread--> rows --threads--> pictures as the model takes them --GPU--> scores --> tables, or a tar
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from microdit.model.device import best_device
from microdit.pipeline.base.threads import chunks, read_ahead, threaded
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.scores import AestheticScores, ClipScores, EmbeddingScores, NsfwScores, scorer_of
from microdit.pipeline.content.images import decode
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import Attempt, begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, column_kind
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest, read_lines, read_rows
from microdit.pipeline.stages.encoding import GPU_THREADS, Batches
from microdit.pipeline.stages.identity import absolute, vision_identity
from microdit.pipeline.stages.rows import commit_all, fail_image, image_bytes, samples
from microdit.pipeline.stages.stage import ColumnSpec, Task

Texts = Mapping[str, Mapping[int, str]]  # captions by column and row
VisionOptions = AestheticScores | ClipScores | EmbeddingScores | NsfwScores
Does = Literal["classify", "aesthetic", "embed", "compare"]

DOES: dict[type, Does] = {
    AestheticScores: "aesthetic",
    ClipScores: "compare",
    EmbeddingScores: "embed",
    NsfwScores: "classify",
}


@dataclass(frozen=True)
class Sample:
    """A picture as the model takes it; `made` by column where its scores belong, and the captions to compare."""

    row: Row
    image: np.ndarray
    made: Mapping[str, Attempt]
    captions: Mapping[str, str]


class VisionScores:
    """The columns of one model: one, or of `clip` one for each captions column.

    A table has the score under the scorer's name; an embedding is a member `<key>.npy`, float16 (width,), of unit
    length. Batches never cross shards and have one shape, the last one too, so that a shard can be made again.
    """

    device = "gpu"

    def __init__(self, name: str, columns: Mapping[str, VisionOptions], max_pixels: int, resources: Resources):
        self.name, self._max_pixels = name, max_pixels
        self._threads, self._batches = resources.decode_threads, Batches(resources.scores_batch)
        self.columns: dict[str, ColumnSpec] = {}
        self._captions: dict[str, str] = {}
        for column, options in columns.items():
            self._options, self._does = options, DOES[type(options)]
            model = vision_identity(column, self._does, options.model, _label(options), options.revision)
            # a branch may move on between the declaration and a worker's start
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
                self._does,
                label=_label(self._options),
                revision=self._revision,
                device=best_device(),
            )

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        images, before = latest(corpus, IMAGES, task.ref), self._batches.seconds
        captions = {c: latest(corpus, name, task.ref) for c, name in self._captions.items() if c in task.columns}
        threads = max(self._threads, GPU_THREADS) if self._model.device.type == "cuda" else self._threads
        size = self._batches.size
        with ExitStack() as stack:
            made: dict[str, Attempt] = {}
            for column, generation in task.columns.items():
                inputs = [images, *([captions[column]] if column in captions else ())]
                made[column] = stack.enter_context(begin_attempt(corpus, column, task.ref, inputs, generation))
            texts = {
                column: {
                    row.row: row.scalars["caption"]
                    for row in samples(read_lines(corpus, commit), {column: made[column]}, task, commit.column)
                }
                for column, commit in captions.items()
            }
            rows = _wanted(read_rows(corpus, images), made, texts, task)
            read = stack.enter_context(closing(read_ahead(rows, size)))
            prepare = partial(self._prepare, texts)
            prepared = stack.enter_context(closing(threaded(prepare, read, threads, size + 2 * threads)))
            for batch in chunks((sample for sample in prepared if sample is not None), size):
                for sample, scores in zip(batch, self._batches.run(self._score, batch), strict=True):
                    for column, attempt in sample.made.items():
                        _write(attempt, sample.row, scores if isinstance(scores, Exception) else scores[column])
            seconds = self._batches.seconds - before
            return commit_all(made, task, encode_seconds=seconds, batch=self._batches.size)

    def _prepare(self, texts: Texts, wanted: tuple[Row, Mapping[str, Attempt]]) -> Sample | None:
        """What the model takes of a sample; None if it cannot be decoded, and is failed."""
        row, made = wanted
        try:
            image = self._model.prepare(decode(image_bytes(row.members), self._max_pixels).pixels)
        except Exception as error:  # this sample fails with it, and no other
            fail_image(made.values(), row, error)
            return None
        return Sample(row, image, made, {column: texts[column][row.row] for column in made if column in texts})

    def _score(self, batch: Sequence[Sample], size: int) -> list[dict[str, np.ndarray]]:
        """Of each sample by column a score, or features (width,)."""
        seen = self._model.see([sample.image for sample in batch], size)
        found = [dict.fromkeys(sample.made, scores) for scores, sample in zip(seen, batch, strict=True)]
        for column in dict.fromkeys(column for sample in batch for column in sample.captions):
            read = self._model.read([sample.captions.get(column, "") for sample in batch], size)
            for scores, cosine in zip(found, (seen * read).sum(1), strict=True):
                scores[column] = cosine
        return found


def _label(options: VisionOptions) -> str | None:
    return options.label if isinstance(options, AestheticScores | NsfwScores) else None


def _wanted(
    rows: Iterable[Row], made: Mapping[str, Attempt], texts: Texts, task: Task
) -> Iterator[tuple[Row, Mapping[str, Attempt]]]:
    """The rows to work on, and for which columns: not for one that its caption has failed in."""
    for row in rows:
        mine = {column: attempt for column, attempt in made.items() if row.row in texts.get(column, (row.row,))}
        for good in samples([row], mine, task, IMAGES):
            if mine:
                yield good, mine


def _write(attempt: Attempt, row: Row, scores: np.ndarray | Exception) -> None:
    if isinstance(scores, Exception):
        attempt.fail(row.row, row.key, "error", f"{type(scores).__name__}: {scores}")
    elif not np.isfinite(scores).all():
        attempt.fail(row.row, row.key, "not_finite", "the model gives NaN, or more than it can hold")
    elif attempt.declaration.kind == "tar":
        attempt.add(row.row, row.key, {"npy": array_bytes(scores.astype(np.float16))})
    else:
        scalars: dict[str, Any] = dict.fromkeys(attempt.declaration.scalars, float(scores))  # there is one
        attempt.add(row.row, row.key, **scalars)
