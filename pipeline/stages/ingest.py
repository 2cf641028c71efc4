"""Ingest: the inputs of a unit, decoded and checked, into shards of the images column."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import closing
from itertools import groupby
from typing import Any

from pipeline.config import BuildConfig, ImageOptions
from pipeline.corpus import Attempt, Corpus, ShardRef, UnitCommit, shard_name
from pipeline.images import BadImage, Prepared, prepare
from pipeline.parallel import threaded
from pipeline.sources import Input, Source
from pipeline.stages import IMAGES

SCALARS = {
    "caption": "string",
    "origin": "string",
    "license": "string",
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
    unit: str,
    config: BuildConfig,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> UnitCommit:
    """Read a unit, write those of its images shards that are not committed yet, then the unit's commit.

    Args:
        progress: called after each shard that this call wrote, with `shard`, the commit's counts (`in`, `out`,
            `failed`) and `seconds`.

    Raises:
        RequestError: the source cannot be read at all. A single bad input is a failed row, never an exception.
    """
    there = {shard for _, shard in corpus.committed(IMAGES, source.name)}

    def shard_of(ordinal: int) -> str:
        return shard_name(unit, ordinal // corpus.shard_samples)

    shards: list[str] = []
    inputs = 0
    found = source.read(unit, lambda ordinal: shard_of(ordinal) not in there)
    decoded = threaded(lambda item: (item, _prepare(item.data, config.images)), found, config.resources.decode_threads)
    with closing(found):
        for shard, samples in groupby(decoded, key=lambda pair: shard_of(pair[0].ordinal)):
            shards.append(shard)
            if shard in there:
                inputs += sum(1 for _ in samples)
                continue
            began = time.monotonic()
            with corpus.attempt(IMAGES, ShardRef(source=source.name, unit=unit, shard=shard)) as attempt:
                for sample, image in samples:
                    _write(attempt, source.name, sample, image, corpus.shard_samples, config.images.format)
                commit = attempt.commit()
            inputs += commit.counts["in"]
            if progress is not None:
                progress({"shard": shard, **commit.counts, "seconds": time.monotonic() - began})
    return corpus.commit_unit(source.name, unit, inputs, shards)


def _prepare(data: bytes | None, options: ImageOptions) -> Result:
    if data is None:
        return None
    try:
        return prepare(data, options)
    except BadImage as error:
        return error
    except Exception as error:  # this sample fails with it, and no other
        return BadImage("damaged", f"{type(error).__name__}: {error}")


def _write(attempt: Attempt, source: str, item: Input, image: Result, shard_samples: int, extension: str) -> None:
    row = item.ordinal % shard_samples
    about = {"caption": item.caption, "origin": item.origin, "license": item.license}
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
