"""Ingest: decode and check the inputs of a unit, and write them into shards of the images column."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import groupby
from threading import Lock
from typing import Any

import pyarrow as pa

from microdit.pipeline.base.errors import DamagedError, UnreadableError
from microdit.pipeline.base.fail_points import fail_point
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import BadImage, Prepared, prepare
from microdit.pipeline.corpus.attempt import Attempt, begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, UNITS, commit_name, shard_name
from microdit.pipeline.corpus.records import UNREPAIRED, Commit, ShardRef, UnitCommit
from microdit.pipeline.corpus.redeclare import DECLARATION, latest_declaration
from microdit.pipeline.corpus.retry_units import base_of, read_retries, taken_again
from microdit.pipeline.sources.retried import read_unit
from microdit.pipeline.sources.source import Input, Source
from microdit.pipeline.stages.isolated_decode import IsolatedDecoder
from microdit.pipeline.stages.salvage import GONE, Salvage, SavedRow
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

NOTE = [name for name in SCALARS if name not in ("format", "bytes")]  # what the member `json` repeats

Report = Callable[[Commit], None]
"""Called with the commit of each shard that was written."""
Decode = Callable[[bytes], Prepared]
DecodedInput = tuple[Input, Prepared | BadImage | None]
"""An input with its image, with what is wrong with that, or without if no bytes came."""


def ingest_stage(options: ImageOptions) -> dict[str, Any]:
    """Return the part of a source's declaration that says how its images are stored."""
    made_by = options.model_dump()
    if options.reduce == "sharp":  # declarations of earlier versions do not have it
        del made_by["reduce"]
    return {"version": 1, **made_by}


class UnitShards:
    """The shards of a unit, which of them are committed, and in a repair what can still be read of the others."""

    def __init__(self, corpus: Corpus, source: str, task: UnitTask, options: ImageOptions):
        self.corpus, self._source, self._unit, self._redo = corpus, source, task.unit, task.redo or {}
        self._repairs, self._options = task.redo is not None, options
        self._committed: dict[str, bool] = {}
        self._salvages: dict[str, Salvage] = {}
        self._lock = Lock()  # inputs are asked for ahead, by another thread
        self._declaration, _ = latest_declaration(corpus, source)
        self.taken = self._taken_again() if self._repairs else {}
        """In a repair the failed rows that a retry unit takes again, by ordinal, with their reason; they stay so."""

    def shard_of(self, ordinal: int) -> str:
        return shard_name(self._unit, ordinal // self.corpus.shard_samples)

    def generation(self, shard: str) -> int:
        return self._redo.get(shard, 0)

    def timings(self, shard: str) -> dict[str, int]:
        """Say in a commit which declaration its texts are of: in a repair that of the rows that are carried over."""
        salvage = self.salvage(shard)
        number = self._declaration if salvage is None else salvage.declaration
        return {DECLARATION: number} if number else {}

    def committed(self, shard: str) -> bool:
        """Look for the shard's commit, when its turn comes: another build may have written it meanwhile."""
        if shard not in self._committed:
            name = commit_name(IMAGES, self._source, shard, self.generation(shard))
            self._committed[shard] = self.corpus.store.exists(name)
        return self._committed[shard]

    def pass_over(self, shard: str, items: Iterable[Input]) -> int:
        """Count the inputs of a committed shard.

        Raises:
            UnreadableError: they are others than those that were committed.
        """
        lines, count = self._lines(shard), 0
        advice = "put it back, then --retry-failed; what is committed of it stays"
        for count, item in enumerate(items, 1):
            alive()
            if lines is None or (count <= len(lines) and _is_same(item, lines[count - 1])):
                continue
            before = f"it was {lines[count - 1]['origin']}" if count <= len(lines) else "there was none"
            raise UnreadableError(
                f"{shard}: row {count - 1} is {item.origin} in the source now, {before}, or had other bytes, when the "
                f"shard was committed: the unit's file was changed in between; {advice}"
            )
        if lines is not None and count < len(lines):
            raise UnreadableError(
                f"{shard}: the source has {count} of its {len(lines)} inputs: the unit's file is cut; {advice}"
            )
        return count

    def _lines(self, shard: str) -> list[dict[str, Any]] | None:
        """Read the newest sidecar of a committed shard; None if it is damaged."""
        generation = self.generation(shard)
        while self.corpus.store.exists(commit_name(IMAGES, self._source, shard, generation + 1)):
            generation += 1
        try:
            commit = self.corpus.commit(IMAGES, self._source, shard, generation)
            return self.corpus.sidecar(commit).to_pylist()
        except (DamagedError, FileNotFoundError, pa.ArrowException):
            return None

    def salvage(self, shard: str) -> Salvage | None:
        """Open what can still be read of a shard; None if this is no repair."""
        if not self._repairs:
            return None
        with self._lock:
            if shard not in self._salvages:
                shard_id, generation = (self._source, shard), self.generation(shard)
                self._salvages[shard] = Salvage(self.corpus, shard_id, generation, self._options)
            return self._salvages[shard]

    def _taken_again(self) -> dict[int, str]:
        size, base = self.corpus.shard_samples, base_of(self._unit)
        rows = taken_again(read_retries(self.corpus, self._source, base), base, size)
        parts = ((row, *row.shard.rpartition("-")) for row in rows)
        return {int(number) * size + row.row: row.reason for row, unit, _, number in parts if unit == self._unit}

    def wanted(self, ordinal: int) -> bool:
        shard = self.shard_of(ordinal)
        if ordinal in self.taken or self.committed(shard):
            return False
        salvage = self.salvage(shard)
        return salvage is None or ordinal % self.corpus.shard_samples not in salvage.exact


def ingest_unit(
    corpus: Corpus, source: Source, task: UnitTask, config: BuildConfig, report: Report | None = None
) -> UnitCommit:
    """Read a unit, write those of its images shards that are not committed yet, then the unit's commit.

    A unit that is complete is not read, except in a repair.

    Raises:
        RequestError: the source cannot be read at all. A single bad input is a failed row, never an exception.
        ValueError: in a repair the source gives other inputs than before, or nothing that is lost could be had again.
    """
    if task.redo is None and corpus.store.exists(commit_name(UNITS, source.name, task.unit, task.generation)):
        return corpus.unit(source.name, task.unit, task.generation)
    unit_shards = UnitShards(corpus, source.name, task, config.images)
    shards: list[str] = []
    kept: list[str] = []
    inputs = 0
    # a shard's timings include the time before its first input: to fetch the file, to wait for the first URL
    since, worked = time.monotonic(), time.process_time()
    with ExitStack() as stack:
        decoded = _decoded(stack, source, task, unit_shards, config)
        for shard, samples in groupby(decoded, key=lambda pair: unit_shards.shard_of(pair[0].ordinal)):
            shards.append(shard)
            if unit_shards.committed(shard):
                inputs += unit_shards.pass_over(shard, (item for item, _ in samples))
            else:
                began = time.monotonic()
                ref = ShardRef(source=source.name, unit=task.unit, shard=shard)
                with begin_attempt(corpus, IMAGES, ref, generation=unit_shards.generation(shard)) as attempt:
                    fail_point("fetching")
                    writer = ShardWriter(attempt, config.images.format, unit_shards.salvage(shard), unit_shards.taken)
                    for sample, image in samples:
                        writer.write(sample, image)
                    inputs += len(attempt.rows)
                    if gained := writer.check():
                        timings = {"wait_seconds": began - since, "cpu_seconds": time.process_time() - worked}
                        commit = attempt.commit(**timings, **writer.timings(), **unit_shards.timings(shard))
                if not gained:
                    kept.append(shard)
                elif report is not None and commit.ours:
                    report(commit)
            since, worked = time.monotonic(), time.process_time()
    fail_point("committing-unit")
    record = commit_unit(corpus, source.name, task.unit, inputs, shards, task.generation)
    fail_point("committed-unit")
    if kept:
        raise ValueError(
            f"{', '.join(kept)}: rows that were lost could not be had from the source this time either; what is there "
            "stays, and `microdit build --repair` tries again"
        )
    return record


def _decoded(
    stack: ExitStack, source: Source, task: UnitTask, shards: UnitShards, config: BuildConfig
) -> Iterator[DecodedInput]:
    """Yield the inputs of a unit in order, decoded in threads; in another process if the unit killed one."""
    decode: Decode = partial(prepare, options=config.images)
    threads = config.resources.decode_threads
    if task.isolated:
        decode = stack.enter_context(IsolatedDecoder(decode, config.resources.stall_timeout))
        threads = 1
    items = stack.enter_context(closing(read_unit(shards.corpus, source, task.unit, shards.wanted)))
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


class ShardWriter:
    """Write the inputs of one shard, in a repair with the rows that can still be read."""

    def __init__(self, attempt: Attempt, extension: str, salvage: Salvage | None, taken: Mapping[int, str]):
        self._attempt, self._extension, self._salvage, self._taken = attempt, extension, salvage, taken
        self._shard_samples = attempt.corpus.shard_samples
        self._fetched = self._unrepaired = 0
        self._gone_over = 0
        """Rows that were there once, and are a retry unit's now."""
        self._profiles: Counter[str] = Counter()

    def write(self, item: Input, image: Prepared | BadImage | None) -> None:
        """Add an input to the shard: as it came, or as it was, or as failed with what is wrong with it.

        Raises:
            ValueError: another input had this row before.
        """
        row = item.ordinal % self._shard_samples
        if self._salvage is not None:
            self._check_same(row, item, self._salvage)
        if item.ordinal in self._taken:
            self._gone_over += self._salvage is not None and self._salvage.had(row)
            detail = "a retry unit has taken it again"
            self._fail(row, replace(item, data=None, reason=self._taken[item.ordinal], detail=detail), None)
            return
        if isinstance(image, Prepared):
            self._fetched += 1
            if image.profile:
                self._profiles[f"profiles_{image.profile}"] += 1
            self._add(row, item, image)
            return
        if self._salvage is not None:
            saved = self._salvage.saved(row)
            hopeless = item.reason in GONE  # there is nothing left to repair it with
            if saved is not None:
                self._unrepaired += not (saved.exact or hopeless)
                self._carry_over(row, saved)
                return
            self._unrepaired += self._salvage.had(row) and not hopeless
        self._fail(row, item, image)

    def check(self) -> bool:
        """Return True if the shard is worth a commit: False if it would be the generation that is there.

        Raises:
            ValueError: the source gave fewer inputs than before.
        """
        if self._salvage is None:
            return True
        if self._salvage.keys is not None and len(self._attempt.rows) != len(self._salvage.keys):
            raise ValueError(
                f"{self._attempt.ref.shard}: the source gives {len(self._attempt.rows)} inputs, it gave "
                f"{len(self._salvage.keys)} before: its file was changed, or is cut; put it back"
            )
        return self._fetched + self._gone_over > 0 or not self._salvage.waits

    def timings(self) -> dict[str, float]:
        """Say in the commit how many rows stay to be repaired, and what became of colour profiles."""
        if self._salvage is None:
            return dict(self._profiles)
        out = sum(row["status"] == "ok" for row in self._attempt.rows)
        known = self._salvage.keys is not None
        lost = self._unrepaired if known else max(self._unrepaired, self._salvage.good - out)
        return {**self._profiles, UNREPAIRED: lost} if lost else dict(self._profiles)

    def _check_same(self, row: int, item: Input, salvage: Salvage) -> None:
        key, keys = item.key, salvage.keys
        if keys is not None and (row >= len(keys) or keys[row] != key):
            before = repr(keys[row]) if row < len(keys) else "no input"
            raise ValueError(
                f"{self._attempt.ref.shard}: row {row} is {key!r} in the source now, it was {before} before: "
                "its file was changed; put it back"
            )
        known = salvage.sha256[row] if keys is not None else None
        if item.sha256 and known and item.sha256 != known:
            raise ValueError(
                f"{self._attempt.ref.shard}: row {row} ({item.origin}) has other bytes in the source than before: "
                "its file was changed; put it back"
            )

    def _add(self, row: int, item: Input, image: Prepared) -> None:
        sizes = {
            "width": image.width,
            "height": image.height,
            "original_width": image.original_width,
            "original_height": image.original_height,
        }
        assert item.data is not None
        scalars = {**_about(item), **sizes, "sha256": hashlib.sha256(item.data).hexdigest()}
        self._store(row, item.key, image.data, {**scalars, "format": image.format})

    def _carry_over(self, row: int, saved: SavedRow) -> None:
        self._store(row, saved.line["key"], saved.data, {name: saved.line[name] for name in SCALARS})

    def _store(self, row: int, key: str, data: bytes, scalars: Mapping[str, Any]) -> None:
        note = {"key": key, "source": self._attempt.ref.source} | {name: scalars[name] for name in NOTE}
        members = {self._extension: data, "json": json.dumps(note, ensure_ascii=False).encode()}
        self._attempt.add(row, key, members, **{**scalars, "bytes": len(data)})

    def _fail(self, row: int, item: Input, image: BadImage | None) -> None:
        about = _about(item)
        if item.data is None:
            self._attempt.fail(row, item.key, item.reason or "missing", item.detail, **about)
            return
        reason, detail = (image.reason, str(image)) if image is not None else ("missing", "")
        sha256 = hashlib.sha256(item.data).hexdigest()
        self._attempt.fail(row, item.key, reason, detail, sha256=sha256, bytes=len(item.data), **about)


def _is_same(item: Input, line: Mapping[str, Any]) -> bool:
    """Compare an input with a committed row: key and origin, and the bytes where the source says that they stay."""
    other_bytes = item.sha256 and line.get("sha256") and item.sha256 != line["sha256"]
    return not other_bytes and item.key == line["key"] and _about(item)["origin"] == (line.get("origin") or "")


def _about(item: Input) -> dict[str, str]:
    """Return what the source says of an input, as UTF-8 can write it."""
    fields = json.dumps(dict(item.fields), ensure_ascii=False, sort_keys=True) if item.fields else ""
    about = {"caption": item.caption, "origin": item.origin, "license": item.license, "fields": fields}
    return {name: value.encode("utf-8", "replace").decode() for name, value in about.items()}
