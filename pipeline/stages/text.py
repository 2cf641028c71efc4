"""`text/<encoder>@<captions>`: captions through a text encoder."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from pipeline.config import TextColumn
from pipeline.corpus import Attempt, Commit, Corpus
from pipeline.shards import array_bytes
from pipeline.stages import ColumnSpec, Row, Task, attempts, commit_all, latest, read_lines, samples
from pipeline.stages.latents import chunks
from pipeline.stages.models import Batches, absolute, best_device, text_encoder_identity

WINDOW = 16  # batches that are sorted by length together; more would hold more embeddings in memory


class Text:
    """One text column: float16 (tokens, width) per sample, without padding, and the number of `tokens`.

    Captions of like length share a batch, inside the shard: the same shard gives the same batches.
    """

    device = "gpu"

    def __init__(self, name: str, options: TextColumn, batch: int):
        self.name = name.replace("/", ":", 1)
        model = text_encoder_identity(name, options.encoder, options.revision)
        self._encoder, self._revision, self._batches = absolute(options.encoder), model.get("revision"), Batches(batch)
        self._captions = f"captions/{name.partition('@')[2]}"
        stage = {"stage": "text", "version": 1, "captions": self._captions, **options.model_dump(), "model": model}
        self.columns = {name: ColumnSpec(stage, {"tokens": "int32"}, (self._captions,))}
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def load(self) -> None:
        from model.text import load_text_encoder

        if self._model is None:
            self._model = load_text_encoder(self._encoder, revision=self._revision, device=best_device())

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        captions, before = latest(corpus, self._captions, task.ref), self._batches.seconds
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [captions])
            rows = samples(read_lines(corpus, captions), made, task, self._captions)
            for window in chunks(rows, WINDOW * self._batches.size):
                embeddings = self._in_batches([row.scalars["caption"] for row in window])
                for row, embedding in zip(window, embeddings, strict=True):
                    for attempt in made.values():
                        _write(attempt, row, embedding)
            return commit_all(made, task, encode_seconds=self._batches.seconds - before, batch=self._batches.size)

    def _in_batches(self, captions: Sequence[str]) -> list[np.ndarray | Exception]:
        """(tokens, width) float16 for each caption, in their order; encoded from the shortest to the longest."""
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        found = dict(zip(order, self._batches.run(self._encode, [captions[i] for i in order]), strict=True))
        return [found[i] for i in range(len(captions))]

    def _encode(self, captions: Sequence[str], size: int) -> list[np.ndarray]:
        embeddings, lengths = self._model.encode(list(captions))
        with np.errstate(over="ignore"):
            return [
                embedding[:length].astype(np.float16)
                for embedding, length in zip(embeddings.cpu().numpy(), lengths.tolist(), strict=True)
            ]


def _write(attempt: Attempt, row: Row, embedding: np.ndarray | Exception) -> None:
    if isinstance(embedding, Exception):
        attempt.fail(row.row, row.key, "error", f"{type(embedding).__name__}: {embedding}")
    elif np.isfinite(embedding).all():
        attempt.add(row.row, row.key, {"npy": array_bytes(embedding)}, tokens=len(embedding))
    else:
        attempt.fail(row.row, row.key, "not_finite", "the text encoder gives NaN, or more than float16 holds")
