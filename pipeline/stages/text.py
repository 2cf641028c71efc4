"""`text/<encoder>@<captions>`: embeddings of captions by a text encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from microdit.model.device import best_device
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.config.encoders import TextColumn
from microdit.pipeline.corpus.arrays import array_bytes, arrays_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.quantised import FORMS, Loss, compared, dequantise, quantise
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest
from microdit.pipeline.stages.batch_line import BatchLine
from microdit.pipeline.stages.encoding import Batches
from microdit.pipeline.stages.identity import absolute, text_encoder_identity
from microdit.pipeline.stages.rows import Outcome, Output, RowFailure, ShardRun, model_failure, open_shard
from microdit.pipeline.stages.stage import ColumnSpec, Task, seed_of

WINDOW = 16  # batches that are sorted by length together; more would hold more embeddings in memory


@dataclass(frozen=True)
class Embedding:
    """A caption's embedding as it is stored."""

    arrays: dict[str, np.ndarray]
    """float16 (tokens, width) under "", or the arrays of a quantised one by name."""
    exact: np.ndarray | None = None
    """The encoder's output, where a quantised embedding is compared with it."""


class Text:
    """One text column: the embedding of each caption without padding, and its number of `tokens`.

    float16 (tokens, width), or quantised (`corpus.quantised`). Captions of similar length share a batch. Batches never
    cross shards: the same shard gives the same batches. In a quantised column one sample in a hundred, chosen by its
    key, is compared with the encoder's output, and the commit records the loss.
    """

    device = "gpu"

    def __init__(self, name: str, options: TextColumn, batch: int):
        self.name = name.replace("/", ":", 1)
        model = text_encoder_identity(name, options.encoder, options.revision, options.trim)
        self._encoder, self._revision, self._batches = absolute(options.encoder), model.get("revision"), Batches(batch)
        self._column, self._captions, self._options = name, f"captions/{name.partition('@')[2]}", options
        stage = {"stage": "text", "version": 2, "captions": self._captions, "model": model}
        stage |= {"encoder": options.encoder, "revision": options.revision}
        if options.storage != "float16":
            form = FORMS[options.storage]
            stage |= {"storage": options.storage, "group": form.group}
            self._max_loss = options.max_loss or form.loss
        self.columns = {name: ColumnSpec(stage, {"tokens": "int32"}, (self._captions,))}
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def load(self) -> None:
        from microdit.model.pretrained.text import load_text_encoder

        if self._model is not None:
            return
        model = load_text_encoder(self._encoder, revision=self._revision, device=best_device(), trim=self._options.trim)
        if self._options.storage == "int4" and model.width % 2:
            raise RequestError(
                f"columns.{self._column}.storage = 'int4': {self._encoder} is {model.width} wide; it takes even ones"
            )
        self._model = model

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        captions, before = latest(corpus, self._captions, task.ref), self._batches.seconds
        loss = Loss.none()
        with open_shard(corpus, task, captions) as shard, BatchLine(1) as line:
            rows = list(shard.rows())
            exact: set[int] = set()
            if self._options.storage != "float16":
                exact = {rows[i].row for i in compared([seed_of(self._column, task.ref.source, r.key) for r in rows])}
            windows = chunks(rows, WINDOW * self._batches.size)
            line.run(windows, partial(self._encode_window, exact), partial(self._write, shard, loss))
            figures = {"encode_seconds": self._batches.seconds - before, "batch": self._batches.size, **loss.figures()}
            return shard.commit(lambda column: figures)

    def _encode_window(self, exact: set[int], window: Sequence[Row]) -> list[Embedding | Exception]:
        """Encode the captions from the shortest to the longest; the embeddings are in the order of the rows."""
        order = sorted(range(len(window)), key=lambda i: len(window[i].scalars["caption"]))
        captions = [(window[i].scalars["caption"], window[i].row in exact) for i in order]
        embeddings = dict(zip(order, self._batches.run(self._encode, captions), strict=True))
        return [embeddings[i] for i in range(len(window))]

    def _encode(self, captions: Sequence[tuple[str, bool]], size: int) -> list[Embedding]:
        """Encode a batch of captions; those with a true flag keep the encoder's output."""
        embeddings, lengths = self._model.encode([caption for caption, _ in captions])
        storage = self._options.storage
        tensors = {"": embeddings.half()} if storage == "float16" else quantise(embeddings, storage)
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        return [
            Embedding(
                {name: array[i, :length].copy() for name, array in arrays.items()},
                embeddings[i, :length].cpu().numpy() if exact else None,
            )
            for i, (length, (_, exact)) in enumerate(zip(lengths.tolist(), captions, strict=True))
        ]

    def _write(
        self, shard: ShardRun, loss: Loss, window: Sequence[Row], embeddings: Sequence[Embedding | Exception]
    ) -> None:
        for row, embedding in zip(window, embeddings, strict=True):
            if isinstance(embedding, Embedding) and embedding.exact is not None and _finite(embedding):
                self._check_loss(loss.compare(embedding.exact, dequantise(embedding.arrays)), shard.task, row)
            shard.write(row, _outcome(embedding))

    def _check_loss(self, error: float, task: Task, row: Row) -> None:
        """Check that quantising a sample has not lost too much.

        Raises:
            RequestError: it has.
        """
        if error > self._max_loss:
            raise RequestError(
                f"columns.{self._column}.storage = {self._options.storage!r}: sample {task.ref.source}/{row.key} loses "
                f"{error:.3g} of its embedding's length, at most {self._max_loss:g} was expected; take more bits in a "
                f"column of another name, or raise columns.{self._column}.max_loss"
            )


def _finite(embedding: Embedding) -> bool:
    return all(array.dtype != np.float16 or bool(np.isfinite(array).all()) for array in embedding.arrays.values())


def _outcome(embedding: Embedding | Exception) -> Outcome:
    if isinstance(embedding, Exception):
        return model_failure(embedding)
    if not _finite(embedding):
        return RowFailure("not_finite", "the text encoder gives NaN, or more than float16 holds")
    arrays = embedding.arrays
    members = {"npy": array_bytes(arrays[""])} if "" in arrays else {"npz": arrays_bytes(arrays)}
    return Output({"tokens": len(next(iter(arrays.values())))}, members)
