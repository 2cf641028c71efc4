"""`text/<encoder>@<captions>`: captions through a text encoder."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from pipeline.config import TextColumn
from pipeline.corpus import Commit, Corpus, ShardRef
from pipeline.shards import array_bytes
from pipeline.stages import ColumnSpec, attempts, fail_upstream, latest
from pipeline.stages.latents import chunks
from pipeline.stages.models import absolute, best_device, text_encoder_identity

WINDOW = 16  # batches that are sorted by length together; more would hold more embeddings in memory


class Text:
    """One text column: float16 (tokens, width) per sample, without padding, and the number of `tokens`.

    Captions of like length share a batch, inside the shard: the same shard gives the same batches.
    """

    device = "gpu"

    def __init__(self, name: str, options: TextColumn, batch: int):
        self.name = name.replace("/", ":", 1)
        model = text_encoder_identity(name, options.encoder, options.revision)
        self._encoder, self._revision, self._batch = absolute(options.encoder), model.get("revision"), batch
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

    def run(self, corpus: Corpus, ref: ShardRef, columns: Sequence[str]) -> list[Commit]:
        self.load()
        captions = latest(corpus, self._captions, ref)
        with ExitStack() as stack:
            made = attempts(stack, corpus, ref, columns, [captions])
            for window in chunks(corpus.sidecar(captions).to_pylist(), WINDOW * self._batch):
                good = [line for line in window if line["status"] == "ok"]
                embeddings = self._encode([line["caption"] for line in good])
                for line in window:
                    if line["status"] != "ok":
                        fail_upstream(made, line, self._captions)
                for line, embedding in zip(good, embeddings, strict=True):
                    for attempt in made.values():
                        if np.isfinite(embedding).all():
                            members = {"npy": array_bytes(embedding)}
                            attempt.add(line["row"], line["key"], members, tokens=len(embedding))
                        else:
                            detail = "the text encoder gives NaN, or more than float16 holds"
                            attempt.fail(line["row"], line["key"], "not_finite", detail)
            return [attempt.commit(batch=self._batch) for attempt in made.values()]

    def _encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """(tokens, width) float16 for each caption, in their order; encoded from the shortest to the longest."""
        found: list[np.ndarray] = [np.empty(0)] * len(captions)
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        for batch in chunks(order, self._batch):
            embeddings, lengths = self._model.encode([captions[i] for i in batch])
            with np.errstate(over="ignore"):
                for i, embedding, length in zip(batch, embeddings.cpu().numpy(), lengths.tolist(), strict=True):
                    found[i] = embedding[:length].astype(np.float16)
        return found
