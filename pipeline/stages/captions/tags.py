"""`captions/<name>` of a tagger: the classes that a small classifier finds likely, as words."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from microdit.model.device import best_device
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.content.images import decode_within
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest
from microdit.pipeline.stages.batch_line import BatchLine, PreparedImage, prepared_images
from microdit.pipeline.stages.captions.asking import SCALARS, caption_output
from microdit.pipeline.stages.encoding import Batches
from microdit.pipeline.stages.identity import tagger_identity
from microdit.pipeline.stages.rows import Outcome, RowFailure, ShardRun, image_bytes, model_failure, open_shard
from microdit.pipeline.stages.stage import ColumnSpec, Task

BATCH = 32
SIDE = 512  # the longest side, at most, of the image that the tagger is given

Image = PreparedImage[np.ndarray]
Likely = list[tuple[str, float]]
"""Names with their probabilities, the likeliest first."""


class Tags:
    """Captions of tags, the likeliest first, with commas between them. A sample without one fails with `no_tag`."""

    device = "gpu"

    def __init__(self, name: str, options: CaptionsColumn, max_pixels: int, threads: int):
        self.name = name.replace("/", ":", 1)
        self._tagger, self._options, self._column = str(options.tags), options, name
        self._max_pixels, self._threads, self._batches = max_pixels, threads, Batches(BATCH)
        stage: dict[str, Any] = {"stage": "captions", "version": 1, "from": "tags", "captioner": options.tags}
        stage |= {"model": tagger_identity(name, self._tagger), "kind": options.kind or "tags"}
        stage |= {"top": options.top, "probability": options.probability}
        self.columns = {name: ColumnSpec(stage, SCALARS, (IMAGES,))}
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def load(self) -> None:
        from microdit.model.pretrained.tagger import load_tagger

        if self._model is None:
            self._model = load_tagger(self._tagger, device=best_device())

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        images, before = latest(corpus, IMAGES, task.ref), self._batches.seconds
        with open_shard(corpus, task, images) as shard, BatchLine(self._threads) as line:
            prepared = prepared_images(line, shard.rows(), self._prepare, shard.write, 2 * BATCH)
            line.run(chunks(prepared, BATCH), self._tag_batch, partial(self._write, shard))
            figures = {"encode_seconds": self._batches.seconds - before, "batch": self._batches.size}
            return shard.commit(lambda column: figures)

    def _prepare(self, row: Row) -> np.ndarray:
        image: np.ndarray = self._model.prepare(decode_within(image_bytes(row.members), self._max_pixels, SIDE))
        return image

    def _tag_batch(self, batch: Sequence[Image]) -> list[Likely | Exception]:
        return self._batches.run(self._tag, [image.image for image in batch])

    def _tag(self, images: Sequence[np.ndarray], size: int) -> list[Likely]:
        tags: list[Likely] = self._model.tag(images, self._options.top, self._options.probability)
        return tags

    def _write(self, shard: ShardRun, batch: Sequence[Image], tagged: Sequence[Likely | Exception]) -> None:
        for image, tags in zip(batch, tagged, strict=True):
            shard.write(image.row, self._outcome(tags))

    def _outcome(self, tags: Likely | Exception) -> Outcome:
        if isinstance(tags, Exception):
            return model_failure(tags)
        if not tags:
            return RowFailure("no_tag", f"nothing is as likely as {self._options.probability:g}")
        return caption_output(", ".join(dict.fromkeys(name for name, _ in tags)))
