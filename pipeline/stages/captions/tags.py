"""`captions/<name>` of a tagger: what a small classifier is sure of, as words."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from microdit.model.device import best_device
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import latest
from microdit.pipeline.stages.captions.asking import SCALARS
from microdit.pipeline.stages.captions.pictures import Loader
from microdit.pipeline.stages.encoding import Batches
from microdit.pipeline.stages.identity import tagger_identity
from microdit.pipeline.stages.rows import attempts, commit_all
from microdit.pipeline.stages.stage import ColumnSpec, Task

BATCH = 32


class Tags:
    """Tags, the likeliest first, with commas between them. A sample without a tag fails with `no_tag`."""

    device = "gpu"

    def __init__(self, name: str, options: CaptionsColumn, max_pixels: int, threads: int):
        self.name = name.replace("/", ":", 1)
        self._tagger, self._options, self._column = str(options.tags), options, name
        self._loader, self._batches = Loader(512, max_pixels, threads), Batches(BATCH)
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
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [images])
            ready = self._loader.pictures(stack, corpus, images, task, made, self._model.prepare, 2 * BATCH)
            for batch in chunks(ready, BATCH):
                found = self._batches.run(self._tag, [one.image for one in batch])
                for one, tags in zip(batch, found, strict=True):
                    for attempt in made.values():
                        if isinstance(tags, Exception):
                            attempt.fail(one.row.row, one.row.key, "error", f"{type(tags).__name__}: {tags}")
                        elif not tags:
                            least = self._options.probability
                            attempt.fail(one.row.row, one.row.key, "no_tag", f"nothing is as likely as {least:g}")
                        else:
                            caption = ", ".join(dict.fromkeys(name for name, _ in tags))
                            attempt.add(one.row.row, one.row.key, caption=caption, tokens=len(caption.split()))
            return commit_all(made, task, encode_seconds=self._batches.seconds - before, batch=self._batches.size)

    def _tag(self, images: Sequence[np.ndarray], size: int) -> list[list[tuple[str, float]]]:
        found: list[list[tuple[str, float]]] = self._model.tag(images, self._options.top, self._options.probability)
        return found
