"""Ingest: decode and check the inputs of a unit, and write them into shards of the images column."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import groupby
from typing import Any

from microdit.pipeline.base.fail_points import fail_point
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import BadImage, Prepared, prepare
from microdit.pipeline.corpus.attempt import Attempt, begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS, commit_name, shard_name
from microdit.pipeline.corpus.records import Commit, ShardRef, UnitCommit
from microdit.pipeline.sources.source import Input, Source
from microdit.pipeline.stages.isolated_decode import IsolatedDecoder
from microdit.pipeline.stages.stage import UnitTask

SCALARS = {
    "caption": "string",
    "origin": "string",
    "license": "string",
    "fields": "string",
    "width": "int32",
    "height": "int32",
    "original_width": "int32",
    "original_height": "int32",
    "format": "string",
    "sha256": "string",
    "bytes": "int64",
}

Report = Callable[[Commit], None]
"""Called with the commit of each shard that was written."""
Decode = Callable[[bytes], Prepared]
DecodedInput = tuple[Input, Prepared | BadImage | None]
"""An input with its image, with what is wrong with that, or without if no bytes came."""


def ingest_stage(options: ImageOptions) -> dict[str, Any]:
    """The part of a source's declaration that says how its images are stored."""
    return {"version": 1, **options.model_dump()}


class UnitShards:
    """The shards of a unit, and which of them are committed."""

    def __init__(self, corpus: Corpus, source: str, task: UnitTask):
        self._corpus, self._source, self._unit, self._redo = corpus, source, task.unit, task.redo or {}
        self._committed: dict[str, bool] = {}

    def shard_of(self, ordinal: int) -> str:
        return shard_name(self._unit, ordinal // self._corpus.shard_samples)

    def generation(self, shard: str) -> int:
        return self._redo.get(shard, 0)

    def committed(self, shard: str) -> bool:
        """Look for the shard's commit, when its turn comes: another build may have written it meanwhile."""
        if shard not in self._committed:
            name = commit_name(IMAGES, self._source, shard, self.generation(shard))
            self._committed[shard] = self._corpus.store.exists(name)
        return self._committed[shard]

    def wanted(self, ordinal: int) -> bool:
        return not self.committed(self.shard_of(ordinal))


def ingest_unit(
    corpus: Corpus, source: Source, task: UnitTask, config: BuildConfig, report: Report | None = None
) -> UnitCommit:
    """Read a unit, write those of its images shards that are not committed yet, then the unit's commit.

    A unit that is complete is not read, except in a repair.

    Raises:
        RequestError: the source cannot be read at all. A single bad input is a failed row, never an exception.
    """
    if task.redo is None and corpus.store.exists(commit_name(UNITS, source.name, task.unit, task.generation)):
        return corpus.unit(source.name, task.unit, task.generation)
    unit_shards = UnitShards(corpus, source.name, task)
    shards: list[str] = []
    inputs = 0
    # a shard's timings include the time before its first input: to fetch the file, to wait for the first URL
    since, worked = time.monotonic(), time.process_time()
    with ExitStack() as stack:
        decoded = _decoded(stack, source, task, unit_shards, config)
        for shard, samples in groupby(decoded, key=lambda pair: unit_shards.shard_of(pair[0].ordinal)):
            shards.append(shard)
            if unit_shards.committed(shard):
                for _ in samples:
                    inputs += 1
                    alive()
            else:
                began = time.monotonic()
                ref = ShardRef(source=source.name, unit=task.unit, shard=shard)
                with begin_attempt(corpus, IMAGES, ref, generation=unit_shards.generation(shard)) as attempt:
                    fail_point("fetching")
                    profiles: Counter[str] = Counter()
                    for sample, image in samples:
                        _write(attempt, source.name, sample, image, corpus.shard_samples, config.images.format)
                        if isinstance(image, Prepared) and image.profile:
                            profiles[f"profiles_{image.profile}"] += 1
                    seconds = {"wait_seconds": began - since, "cpu_seconds": time.process_time() - worked}
                    commit = attempt.commit(**seconds, **profiles)
                inputs += commit.counts["in"]
                if report is not None and commit.ours:
                    report(commit)
            since, worked = time.monotonic(), time.process_time()
    fail_point("committing-unit")
    record = commit_unit(corpus, source.name, task.unit, inputs, shards, task.generation)
    fail_point("committed-unit")
    return record


def _decoded(
    stack: ExitStack, source: Source, task: UnitTask, shards: UnitShards, config: BuildConfig
) -> Iterator[DecodedInput]:
    """The inputs of a unit in order, decoded in threads; in another process if the unit killed one."""
    decode: Decode = partial(prepare, options=config.images)
    threads = config.resources.decode_threads
    if task.isolated:
        decode = stack.enter_context(IsolatedDecoder(decode, config.resources.stall_timeout))
        threads = 1
    items = stack.enter_context(closing(source.read(task.unit, shards.wanted)))
    return threaded(lambda item: (item, _prepare(item.data, decode)), items, threads)


def _prepare(data: bytes | None, decode: Decode) -> Prepared | BadImage | None:
    if data is None:
        return None
    try:
        return decode(data)
    except BadImage as error:
        return error
    except Exception as error:  # this sample fails with it, and no other
        return BadImage("damaged", f"{type(error).__name__}: {error}")


def _write(
    attempt: Attempt,
    source: str,
    item: Input,
    image: Prepared | BadImage | None,
    shard_samples: int,
    extension: str,
) -> None:
    """Add an input to its shard, or fail it with what is wrong with it."""
    row = item.ordinal % shard_samples
    fields = json.dumps(dict(item.fields), ensure_ascii=False, sort_keys=True) if item.fields else ""
    about = {"caption": item.caption, "origin": item.origin, "license": item.license, "fields": fields}
    about = {name: value.encode("utf-8", "replace").decode() for name, value in about.items()}
    if item.data is None:
        attempt.fail(row, item.key, item.reason or "missing", item.detail, **about)
        return
    sha256 = hashlib.sha256(item.data).hexdigest()
    if not isinstance(image, Prepared):
        reason, detail = (image.reason, str(image)) if image is not None else ("missing", "")
        attempt.fail(row, item.key, reason, detail, sha256=sha256, bytes=len(item.data), **about)
        return
    sizes = {
        "width": image.width,
        "height": image.height,
        "original_width": image.original_width,
        "original_height": image.original_height,
    }
    note = {"key": item.key, "source": source, **about, **sizes, "sha256": sha256}
    members = {extension: image.data, "json": json.dumps(note, ensure_ascii=False).encode()}
    attempt.add(row, item.key, members, format=image.format, sha256=sha256, bytes=len(image.data), **about, **sizes)
