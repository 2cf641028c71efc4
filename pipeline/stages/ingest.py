"""Ingest: the inputs of a unit, decoded and checked, into shards of the images column."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import cache, partial
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

Result = Prepared | BadImage | None


def ingest_stage(options: ImageOptions) -> dict[str, Any]:
    """What ingest adds to the declaration of a source."""
    return {"version": 1, **options.model_dump()}


def ingest_unit(
    corpus: Corpus,
    source: Source,
    task: UnitTask,
    config: BuildConfig,
    progress: Callable[[Commit], None] | None = None,
) -> UnitCommit:
    """Read a unit, write those of its images shards that are not committed yet, then the unit's commit.

    A unit that is complete is not read, but in a repair.

    Args:
        progress: called with the commit of each shard that this call wrote.

    Raises:
        RequestError: the source cannot be read at all. A single bad input is a failed row, never an exception.
    """
    unit, redo = task.unit, task.redo
    if redo is None and corpus.store.exists(commit_name(UNITS, source.name, unit, task.generation)):
        return corpus.unit(source.name, unit, task.generation)

    @cache
    def there(shard: str) -> bool:  # asked when its turn comes: another build may have made it meanwhile
        return corpus.store.exists(commit_name(IMAGES, source.name, shard, (redo or {}).get(shard, 0)))

    def shard_of(ordinal: int) -> str:
        return shard_name(unit, ordinal // corpus.shard_samples)

    shards: list[str] = []
    inputs = 0
    since, worked = time.monotonic(), time.process_time()
    with ExitStack() as stack:
        decode: Callable[[bytes], Prepared] = partial(prepare, options=config.images)
        threads = config.resources.decode_threads
        if task.isolated:
            decode = stack.enter_context(IsolatedDecoder(decode, config.resources.stall_timeout))
            threads = 1
        found = stack.enter_context(closing(source.read(unit, lambda ordinal: not there(shard_of(ordinal)))))
        decoded = threaded(lambda item: (item, _prepare(item.data, decode)), found, threads)
        for shard, samples in groupby(decoded, key=lambda pair: shard_of(pair[0].ordinal)):
            shards.append(shard)
            if there(shard):
                for _ in samples:
                    inputs += 1
                    alive()
                since, worked = time.monotonic(), time.process_time()
                continue
            began = time.monotonic()
            ref = ShardRef(source=source.name, unit=unit, shard=shard)
            with begin_attempt(corpus, IMAGES, ref, generation=(redo or {}).get(shard, 0)) as attempt:
                fail_point("fetching")
                for sample, image in samples:
                    _write(attempt, source.name, sample, image, corpus.shard_samples, config.images.format)
                # with what came before its first input: the file's way to this machine, the wait for the first URL
                commit = attempt.commit(wait_seconds=began - since, cpu_seconds=time.process_time() - worked)
            since, worked = time.monotonic(), time.process_time()
            inputs += commit.counts["in"]
            if progress is not None and commit.ours:
                progress(commit)
    fail_point("committing-unit")
    record = commit_unit(corpus, source.name, unit, inputs, shards, task.generation)
    fail_point("committed-unit")
    return record


def _prepare(data: bytes | None, decode: Callable[[bytes], Prepared]) -> Result:
    if data is None:
        return None
    try:
        return decode(data)
    except BadImage as error:
        return error
    except Exception as error:  # this sample fails with it, and no other
        return BadImage("damaged", f"{type(error).__name__}: {error}")


def _write(attempt: Attempt, source: str, item: Input, image: Result, shard_samples: int, extension: str) -> None:
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
