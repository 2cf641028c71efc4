"""`captions/<name>` of a vision-language model: all columns of a model in one pass over the images.

committed tar --a thread--> rows --threads--> pictures --GPU, one prompt after the other--> answers --> captions
                                                               ^--- what is no caption, once more ---'
"""

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from microdit.model.device import best_device
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.corpus.attempt import Attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import latest
from microdit.pipeline.stages.captions.asking import AGAIN, SCALARS, add_caption, asked_of, check_language, prompt_of
from microdit.pipeline.stages.captions.pictures import Loader, Ready
from microdit.pipeline.stages.encoding import GPU_THREADS, Batches
from microdit.pipeline.stages.identity import absolute, captioner_identity
from microdit.pipeline.stages.rows import attempts
from microdit.pipeline.stages.stage import ColumnSpec, Task, seed_of

IN_FLIGHT = 256  # images that vLLM is given at a time, at least: it makes its own batches of them


@dataclass
class Asked:
    """What becomes of one column of a shard. `again` are the samples to ask once more, and what was wrong."""

    attempt: Attempt
    batches: Batches
    before: float
    again: list[tuple[Ready[Any], str]] = field(default_factory=list)
    asked_again: int = 0


class Vlm:
    """The columns of one captioner. A sample fails with what is wrong with the second of its answers.

    Batches never cross shards; those of the second try neither, so that a shard is the same when it is made again. No
    column's captions depend on the others that are made with it.
    """

    device = "gpu"

    def __init__(self, columns: Mapping[str, CaptionsColumn], max_pixels: int, resources: Resources):
        self._options = dict(columns)
        first, options = next(iter(columns.items()))
        self.name = first.replace("/", ":", 1) + (f"+{len(columns) - 1}" if len(columns) > 1 else "")
        self._engine, self._loader = options.engine, Loader(options.image_side, max_pixels, resources.decode_threads)
        self._batch, self._share = resources.captions_batch, resources.gpus_per_actor or 1.0
        if self._engine == "vllm":
            self._batch = max(self._batch, IN_FLIGHT)
            if importlib.util.find_spec("vllm") is None:
                raise RequestError(f"columns.{first}.engine = 'vllm': it is missing; pip install \"microdit[vllm]\"")
        self._prompts: dict[str, str] = {}
        self.columns: dict[str, ColumnSpec] = {}
        for name, options in columns.items():
            model = captioner_identity(name, str(options.vlm), options.revision)
            check_language(name, options)
            self._prompts[name] = prompt_of(name, options, model["family"])
            stage = {"stage": "captions", "version": 1, "from": "vlm", "engine": options.engine, "model": model}
            stage |= {"captioner": options.vlm, "revision": options.revision}
            self.columns[name] = ColumnSpec({**stage, **asked_of(options, self._prompts[name])}, SCALARS, (IMAGES,))
        self._origin = absolute(str(options.vlm)), model.get("revision")
        self.model: Any = None
        self._batches: dict[str, Batches] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None, "_batches": {}}

    def load(self) -> None:
        if self.model is not None:
            return
        where, revision = self._origin
        if self._engine == "vllm":
            from microdit.model.pretrained.captioners_vllm import load_vllm

            self.model = load_vllm(where, revision=revision, share=self._share)
        else:
            from microdit.model.pretrained.captioners import load_captioner

            self.model = load_captioner(where, revision=revision, device=best_device())
        # of its own: what one column had no room for is no matter of another's words
        self._batches = {name: Batches(self._batch) for name in self._options}

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        images = latest(corpus, IMAGES, task.ref)
        with ExitStack() as stack:
            made = attempts(stack, corpus, task, [images])
            asked = {
                column: Asked(attempt, self._batches[column], self._batches[column].seconds)
                for column, attempt in made.items()
            }
            loader = self._loader
            if self.model.device.type == "cuda":
                loader = Loader(loader.side, loader.max_pixels, max(loader.threads, GPU_THREADS))
            ready = loader.pictures(stack, corpus, images, task, made, self.model.prepare, 2 * self._batch)
            for batch in chunks(ready, self._batch):
                for column, one in asked.items():
                    self._first(column, one, batch, task.ref.source)
            for column, one in asked.items():
                self._once_more(column, one, task.ref.source)
            if task.rows is not None:  # it was only a trial of them
                return []
            return [
                one.attempt.commit(
                    encode_seconds=one.batches.seconds - one.before, batch=one.batches.size, again=one.asked_again
                )
                for one in asked.values()
            ]

    def _first(self, column: str, one: Asked, batch: Sequence[Ready[Any]], source: str) -> None:
        """Ask for the captions of a batch. What is none waits until there are as many as a batch has."""
        temperature = self._options[column].temperature
        answers = self._answers(column, one, batch, temperature, [seed_of(column, source, r.row.key) for r in batch])
        for ready, answer in zip(batch, answers, strict=True):
            if (bad := self._write(column, one.attempt, ready, answer)) is not None:
                one.again.append((ready, bad[0]))
        if len(one.again) >= self._batch:
            self._once_more(column, one, source)

    def _once_more(self, column: str, one: Asked, source: str) -> None:
        temperature = max(self._options[column].temperature, AGAIN)
        batch = [ready for ready, _ in one.again]
        seeds = [seed_of(f"{column} again", source, ready.row.key) for ready in batch]
        answers = self._answers(column, one, batch, temperature, seeds)
        for (ready, first), answer in zip(one.again, answers, strict=True):
            if (bad := self._write(column, one.attempt, ready, answer)) is not None:
                detail = bad[1] if bad[0] == first else f"{bad[1]} (first {first})"
                one.attempt.fail(ready.row.row, ready.row.key, bad[0], detail)
        one.asked_again += len(batch)
        one.again = []

    def _answers(
        self, column: str, one: Asked, batch: Sequence[Ready[Any]], temperature: float, seeds: Sequence[int]
    ) -> list[Any]:
        asked = list(zip([ready.image for ready in batch], seeds, strict=True))
        return one.batches.run(partial(self._generate, column, temperature), asked)

    def _generate(self, column: str, temperature: float, asked: Sequence[tuple[Any, int]], size: int) -> list[Any]:
        pictures, seeds = zip(*asked, strict=True)
        most = self._options[column].most_tokens
        found: list[Any] = self.model.generate(pictures, self._prompts[column], most, temperature, seeds)
        return found

    def _write(self, column: str, attempt: Attempt, ready: Ready[Any], answer: Any) -> tuple[str, str] | None:
        """Add the caption; or tell what is wrong with it. What the model could not do is failed for good."""
        if isinstance(answer, Exception):
            attempt.fail(ready.row.row, ready.row.key, "error", f"{type(answer).__name__}: {answer}")
            return None
        return add_caption(attempt, ready, answer.text, answer.finished, self._options[column])
