"""`captions/<name>` of a vision-language model: all columns of a model in one pass over the images."""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from microdit.model.device import best_device
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.content.images import decode_within
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import Row, latest
from microdit.pipeline.stages.batch_line import BatchLine, PreparedImage, decode_threads, prepared_images
from microdit.pipeline.stages.captions.asking import AGAIN, SCALARS, asked_of, check_language, judge, prompt_of
from microdit.pipeline.stages.encoding import Batches
from microdit.pipeline.stages.identity import absolute, captioner_identity
from microdit.pipeline.stages.rows import Outcome, RowFailure, ShardRun, image_bytes, model_failure, open_shard
from microdit.pipeline.stages.stage import ColumnSpec, Task, seed_of

IN_FLIGHT = 256  # images that vLLM is given at a time, at least: it makes its own batches of them

Image = PreparedImage[Any]
Captioned = tuple[str, Row, Outcome]
"""Column, sample, and its caption or failure."""


@dataclass
class ColumnRun:
    """One column of a shard in progress."""

    batches: Batches
    seconds_before: float
    """Seconds that the model had worked on the column before this shard."""
    rejected: list[tuple[Image, RowFailure]] = field(default_factory=list)
    """Samples to ask for again, and what was wrong with their first answer."""
    asked_again: int = 0

    def figures(self) -> dict[str, float]:
        seconds = self.batches.seconds - self.seconds_before
        return {"encode_seconds": seconds, "batch": self.batches.size, "again": self.asked_again}


class Vlm:
    """The columns of one captioner.

    A rejected answer is asked for once more; the sample fails with what is wrong with the second one. Batches, those of
    the second try too, never cross shards, so that a shard's bytes can be reproduced. No column's captions depend on
    the others that are made with it.
    """

    device = "gpu"

    def __init__(self, columns: Mapping[str, CaptionsColumn], max_pixels: int, resources: Resources):
        self._options = dict(columns)
        first, options = next(iter(columns.items()))
        self.name = first.replace("/", ":", 1) + (f"+{len(columns) - 1}" if len(columns) > 1 else "")
        self._engine, self._side, self._max_pixels = options.engine, options.image_side, max_pixels
        self._threads = resources.decode_threads
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
        name, revision = self._origin
        if self._engine == "vllm":
            from microdit.model.pretrained.captioners_vllm import load_vllm

            self.model = load_vllm(name, revision=revision, share=self._share)
        else:
            from microdit.model.pretrained.captioners import load_captioner

            self.model = load_captioner(name, revision=revision, device=best_device())
        # one Batches per column: halving the batch size for one must not change another column's captions
        self._batches = {column: Batches(self._batch) for column in self._options}

    def run(self, corpus: Corpus, task: Task) -> list[Commit]:
        self.load()
        images, source = latest(corpus, IMAGES, task.ref), task.ref.source
        threads = decode_threads(self._threads, self.model.device)
        with open_shard(corpus, task, images) as shard, BatchLine(threads) as line:
            runs = {c: ColumnRun(self._batches[c], self._batches[c].seconds) for c in shard.attempts}
            prepared = prepared_images(line, shard.rows(), self._prepare, shard.write, 2 * self._batch)
            batches, write = chunks(prepared, self._batch), partial(_write, shard)
            line.run(batches, partial(self._caption_batch, runs, source), lambda batch, captioned: write(captioned))
            for column, run in runs.items():
                write(self._ask_again(column, run, source))
            return shard.commit(lambda column: runs[column].figures())

    def _prepare(self, row: Row) -> Any:
        return self.model.prepare(decode_within(image_bytes(row.members), self._max_pixels, self._side))

    def _caption_batch(self, runs: Mapping[str, ColumnRun], source: str, batch: Sequence[Image]) -> list[Captioned]:
        """Caption one batch in every column.

        Rejected answers are collected, and asked for again once a full batch of them has accumulated.
        """
        captioned = []
        for column, run in runs.items():
            seeds = [seed_of(column, source, image.row.key) for image in batch]
            answers = self._answers(column, run, batch, self._options[column].temperature, seeds)
            for image, answer in zip(batch, answers, strict=True):
                outcome = self._judge(column, answer)
                if isinstance(outcome, RowFailure) and not isinstance(answer, Exception):
                    run.rejected.append((image, outcome))
                else:
                    captioned.append((column, image.row, outcome))
            if len(run.rejected) >= self._batch:
                captioned += self._ask_again(column, run, source)
        return captioned

    def _ask_again(self, column: str, run: ColumnRun, source: str) -> Iterator[Captioned]:
        """Caption the rejected samples of a column again, with other seeds and a higher temperature."""
        rejected, run.rejected = run.rejected, []
        run.asked_again += len(rejected)
        temperature = max(self._options[column].temperature, AGAIN)
        seeds = [seed_of(f"{column} again", source, image.row.key) for image, _ in rejected]
        answers = self._answers(column, run, [image for image, _ in rejected], temperature, seeds)
        for (image, first), answer in zip(rejected, answers, strict=True):
            outcome = self._judge(column, answer)
            if isinstance(outcome, RowFailure) and not isinstance(answer, Exception) and outcome.reason != first.reason:
                outcome = RowFailure(outcome.reason, f"{outcome} (first {first.reason})")
            yield column, image.row, outcome

    def _answers(
        self, column: str, run: ColumnRun, batch: Sequence[Image], temperature: float, seeds: Sequence[int]
    ) -> list[Any]:
        asked = list(zip([image.image for image in batch], seeds, strict=True))
        return run.batches.run(partial(self._generate, column, temperature), asked)

    def _generate(self, column: str, temperature: float, asked: Sequence[tuple[Any, int]], size: int) -> list[Any]:
        pictures, seeds = zip(*asked, strict=True)
        most = self._options[column].most_tokens
        answers: list[Any] = self.model.generate(pictures, self._prompts[column], most, temperature, seeds)
        return answers

    def _judge(self, column: str, answer: Any) -> Outcome:
        if isinstance(answer, Exception):  # what the model cannot do is not asked for again
            return model_failure(answer)
        return judge(answer.text, answer.finished, self._options[column])


def _write(shard: ShardRun, captioned: Iterable[Captioned]) -> None:
    for column, row, outcome in captioned:
        shard.write_column(column, row, outcome)
