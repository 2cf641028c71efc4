"""`microdit convert MDS CORPUS`: latents and text that the official micro_diffusion code has made, as a corpus.

`pipeline.mds.columns` says which column becomes which. Each MDS shard is a unit. What is committed is not written
again, so the same call goes on where one was stopped.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from microdit.pipeline.base.fail_points import fail_point
from microdit.pipeline.base.progress import Line, Progress, Snapshot, Tally
from microdit.pipeline.base.threads import threaded
from microdit.pipeline.content.images import BadImage, prepare
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import write_failure
from microdit.pipeline.corpus.names import IMAGES, UNITS, commit_name, shard_name, unit_name
from microdit.pipeline.corpus.records import Commit, ShardRef, canonical
from microdit.pipeline.corpus.rows import Row, latest, read_lines
from microdit.pipeline.mds.columns import (
    CAPTION,
    PICTURE,
    PICTURES,
    Arrays,
    Conversion,
    Naming,
    float16_array,
    last,
    look,
)
from microdit.pipeline.mds.format import DamagedSample, DamagedShard, Shard, hasher, open_shard
from microdit.pipeline.stages.ingest import SCALARS, ingest_stage
from microdit.pipeline.stages.rows import samples
from microdit.pipeline.stages.stage import Task
from microdit.pipeline.storage.store import open_store
from microdit.pipeline.tables.commit_table import commit_table, totals
from microdit.pipeline.upkeep.damage import damage

MOST_FAILED = 0.1  # the share of a column's samples that may fail before the exit status is 1
Redo = dict[str, set[str]]  # by column the shards, and with the column `units` the units, that are made again


@dataclass(frozen=True)
class Done:
    """What one unit came to: samples and bytes that were written, or why it could not be read."""

    number: int
    samples: int = 0
    failed: int = 0
    bytes: int = 0
    message: str = ""


# -- the corpus ------------------------------------------------------------------------------------------------------
def to_corpus(
    folder: Path,
    url: str,
    naming: Naming,
    threads: int = 4,
    progress: Progress | None = None,
    repair: bool = False,
) -> dict[str, Any]:
    """Convert an MDS folder, or go on with it. The corpus is made if there is none.

    A shard that cannot be read is set aside (`failures/units/...`), and the rest goes on; the same call tries it again.

    Args:
        threads: MDS shards at a time.
        repair: read all that is committed in the corpus first (`verify`), and make again what is damaged, lost or
            stale of this source, and what hangs on it.

    Returns:
        dict: `source`; `units`: `total`, `read` and `set_aside`; `inputs`: samples that the index tells of, `unread`:
        those of them in shards that cannot be read; `columns`: `in`, `out`, `failed`, `reasons` of each, with
        in = out + failed and inputs = in + unread; `set_aside`: `samples` and `message`; `left_out`: MDS
        columns that were not taken; `unchecked`: names of hashes that cannot be made here; `written`: samples of this
        run; `seconds`; `exit_status`.

    Raises:
        RequestError: the folder, a name or the corpus does not fit.
    """
    began = time.monotonic()
    conversion = look(folder, naming)
    corpus = _open_or_create(url)
    declare(corpus, conversion)
    source, total = naming.source, len(conversion.shards)
    redo: Redo = {}
    if repair:
        redo, notes = _damaged(corpus, conversion)
        if progress is not None:
            progress(Snapshot(time.monotonic() - began, [], notes))
    there = {
        column: {shard for _, shard in corpus.committed(column, source)} - redo.get(column, set())
        for column in (*conversion.columns, UNITS)
    }

    def complete(number: int) -> bool:
        unit, names = shards_of(corpus, conversion, number)
        return unit in there[UNITS] and all(there[column].issuperset(names) for column in conversion.columns)

    todo = [number for number in range(total) if not complete(number)]
    tally = Tally()
    aside: list[dict[str, Any]] = []

    def report() -> None:
        rates = tally.rates()
        done = total - len(todo) + tally.jobs
        line = Line(
            "convert", "shards", done, total, aside=len(aside), running=min(threads, total - done), workers=threads
        )
        line.samples, line.failed, line.rate, line.bytes_rate = tally.samples, tally.failed, rates.samples, rates.bytes
        line.left = (total - done) / rates.jobs if rates.jobs else None
        if progress is not None:
            progress(Snapshot(time.monotonic() - began, [line]))

    tally.begin()
    report()
    for done in threaded(partial(convert_unit, corpus, conversion, redo=redo), todo, threads):
        tally.add(1, done.samples, done.failed, done.bytes)
        if done.message:
            aside.append({"samples": conversion.shards[done.number].samples, "message": done.message})
        report()
    return _summary(corpus, conversion, aside, tally.samples, time.monotonic() - began)


def _open_or_create(url: str) -> Corpus:
    if open_store(url).exists("corpus.json"):
        return Corpus.open(url)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", last(url)).lstrip("-._") or "converted"
    return Corpus.create(url, name)


def declare(corpus: Corpus, conversion: Conversion) -> None:
    """Declare the source and the columns.

    Raises:
        RequestError: one is there and was made of something else.
    """
    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    digest = hashlib.sha256()
    for shard in conversion.shards:
        digest.update(canonical({"samples": shard.samples, **shard.raw_data.model_dump()}) + b"\n")
    stage = {
        "adapter": "mds",
        "version": 1,
        "files": {"sha256": digest.hexdigest()},
        "units": len(conversion.shards),
        "images": ingest_stage(PICTURES) if conversion.pictures else None,
    }
    corpus.declare_source(conversion.naming.source, stage)
    specs = conversion.captions.columns | {column: array.spec for column, array in conversion.arrays.items()}
    for column, spec in specs.items():
        corpus.declare_column(column, spec.stage, spec.scalars)


def _damaged(corpus: Corpus, conversion: Conversion) -> tuple[Redo, list[str]]:
    """What of a source must be made again, and what there is to say of it."""
    found, source = damage(corpus), conversion.naming.source
    redo: Redo = {
        column: {shard for where, shard in found.redo.get(column, ()) if where == source}
        for column in (*conversion.columns, UNITS)
    }
    specs = conversion.captions.columns | {column: array.spec for column, array in conversion.arrays.items()}
    for column, spec in specs.items():  # captions before the text that hangs on them
        redo[column].update(*(redo[upstream] for upstream in spec.inputs))
    notes = [f"repair: {column}/{source}/{shard} is made again" for column in redo for shard in sorted(redo[column])]
    for problem in found.beyond:
        notes.append(f"repair: beyond its power: {problem}")
    return redo, notes


def shards_of(corpus: Corpus, conversion: Conversion, number: int) -> tuple[str, list[str]]:
    """The name of a unit, and those of its shards."""
    unit = unit_name(conversion.naming.source, number)
    count = math.ceil(conversion.shards[number].samples / corpus.shard_samples)
    return unit, [shard_name(unit, i) for i in range(count)]


def convert_unit(corpus: Corpus, conversion: Conversion, number: int, redo: Redo) -> Done:
    """Write what is not committed of one MDS shard, or is made again, then the unit's commit."""
    info, source = conversion.shards[number], conversion.naming.source
    unit, names = shards_of(corpus, conversion, number)
    samples = failed = size = 0
    try:
        with open_shard(conversion.folder, info) as file:
            for i, shard in enumerate(names):
                first = i * corpus.shard_samples
                ref = ShardRef(source=source, unit=unit, shard=shard)
                if made := _Part(corpus, conversion, redo, file, number, first, ref).convert():
                    samples += made[0].counts["in"]
                    failed += max(commit.counts["failed"] for commit in made)
                    size += sum(commit.size for commit in made)
    except DamagedShard as error:
        write_failure(corpus, UNITS, source, unit, stage="convert", attempts=1, message=str(error), traceback="")
        return Done(number, message=str(error))
    fail_point("committing-unit")
    if (generation := _generation(corpus, UNITS, source, unit, redo)) is not None:
        commit_unit(corpus, source, unit, info.samples, names, generation)
    return Done(number, samples, failed, size)


def _generation(corpus: Corpus, column: str, source: str, shard: str, redo: Redo) -> int | None:
    """The generation that is to be written of a shard (or unit); None if nothing is."""
    generation = 0
    while corpus.store.exists(commit_name(column, source, shard, generation)):
        generation += 1
    return generation if not generation or shard in redo.get(column, ()) else None


@dataclass(frozen=True)
class _Part:
    """The samples of an MDS shard, from `first` on, that become the shard `ref`."""

    corpus: Corpus
    conversion: Conversion
    redo: Redo
    file: Shard
    number: int
    first: int
    ref: ShardRef

    def convert(self) -> list[Commit]:
        """The commits that this call wrote."""
        made: list[Commit] = []
        for column in self.conversion.columns:  # in this order: each finds there what it hangs on
            generation = _generation(self.corpus, column, self.ref.source, self.ref.shard, self.redo)
            if generation is None:
                continue
            if column == IMAGES:
                made.append(self._images(generation))
            elif column in self.conversion.arrays:
                made.append(self._arrays(column, self.conversion.arrays[column], generation))
            else:
                made += self.conversion.captions.run(self.corpus, Task(self.ref, {column: generation}))
        return [commit for commit in made if commit.ours]

    def _images(self, generation: int) -> Commit:
        end = min(self.first + self.corpus.shard_samples, self.file.info.samples)
        with begin_attempt(self.corpus, IMAGES, self.ref, generation=generation) as attempt:
            for row, i in enumerate(range(self.first, end)):
                key, about = f"{self.number:06d}-{i:06d}", {"origin": f"{self.file.info.raw_data.basename}#{i}"}
                try:
                    members, scalars = self._picture(key, about["origin"], i)
                except DamagedSample as error:
                    attempt.fail(row, key, "damaged", str(error), **about)
                except UnicodeDecodeError as error:
                    attempt.fail(row, key, "not_text", f"its caption is no UTF-8: {error}", **about)
                except BadImage as error:
                    attempt.fail(row, key, error.reason, str(error), **about)
                else:
                    attempt.add(row, key, members, **scalars)
            return attempt.commit()

    def _picture(self, key: str, origin: str, i: int) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Members and scalars of a sample of the images column; without a picture it has null for what that says."""
        pictures = self.conversion.pictures
        caption, *data = self.file.read(i, [CAPTION, *([PICTURE] if pictures else [])])
        texts = {"caption": caption.decode(), "origin": origin, "license": "", "fields": ""}
        members: dict[str, bytes] = {}
        sizes, sha256, scalars = dict.fromkeys(("width", "height", "original_width", "original_height"), 0), "", {}
        if pictures:
            image = prepare(data[0], PICTURES)
            members, sizes = {PICTURES.format: image.data}, {name: getattr(image, name) for name in sizes}
            sha256 = hashlib.sha256(data[0]).hexdigest()
            scalars = {**sizes, "sha256": sha256, "format": image.format, "bytes": len(image.data)}
        note = {"key": key, "source": self.ref.source, **texts, **sizes, "sha256": sha256}
        return {**members, "json": json.dumps(note, ensure_ascii=False).encode()}, texts | scalars

    def _arrays(self, name: str, column: Arrays, generation: int) -> Commit:
        (upstream,) = column.spec.inputs
        inputs = latest(self.corpus, upstream, self.ref)
        task = Task(self.ref, {name: generation})
        with begin_attempt(self.corpus, name, self.ref, [inputs], generation) as attempt:
            for row in samples(read_lines(self.corpus, inputs), {name: attempt}, task, upstream):
                data, scalars, reason, detail = self._array(row, column)
                if reason:
                    attempt.fail(row.row, row.key, reason, detail)
                else:
                    attempt.add(row.row, row.key, {"npy": data}, **scalars)
            return attempt.commit()

    def _array(self, row: Row, column: Arrays) -> tuple[bytes, dict[str, Any], str, str]:
        """The member of a sample and its scalars; or the reason why there is none."""
        try:
            array = float16_array(self.file.read(self.first + row.row, [column.field])[0], column.shape)
        except DamagedSample as error:
            return b"", {}, "damaged", str(error)
        except ValueError as error:
            return b"", {}, "wrong_size", f"{column.field}: {error}"
        # without the sign bit the bits of floats are in the floats' order, and numpy compares them ten times as fast
        absmax = float((array.view("<u2") & 0x7FFF).max().view(np.float16))
        if not np.isfinite(absmax):
            return b"", {}, "not_finite", f"{column.field} has NaN or infinity"
        known = {"tokens": array.shape[0], "absmax": absmax}
        return array_bytes(array), {scalar: known[scalar] for scalar in column.spec.scalars}, "", ""


# -- what came of it -------------------------------------------------------------------------------------------------
def _summary(
    corpus: Corpus, conversion: Conversion, aside: list[dict[str, Any]], written: int, seconds: float
) -> dict[str, Any]:
    source, found = conversion.naming.source, totals(commit_table(corpus))
    columns: dict[str, dict[str, Any]] = {}
    for column in conversion.columns:
        there = found.get((column, source))
        columns[column] = {
            "in": there.inputs if there else 0,
            "out": there.out if there else 0,
            "failed": there.failed if there else 0,
            "reasons": dict(there.reasons.most_common()) if there else {},
        }
    units = found.get((UNITS, source))
    inputs = sum(shard.samples for shard in conversion.shards)
    hashes = {name for shard in conversion.shards for name in shard.raw_data.hashes}
    return {
        "corpus": corpus.url,
        "source": source,
        "units": {"total": len(conversion.shards), "read": units.done if units else 0, "set_aside": len(aside)},
        "inputs": inputs,
        "unread": inputs - columns[IMAGES]["in"],
        "columns": columns,
        "set_aside": aside,
        "left_out": conversion.left_out,
        "unchecked": sorted(name for name in hashes if hasher(name) is None),
        "written": written,
        "seconds": round(seconds, 3),
        "exit_status": 1 if aside or any(_failures(c) > MOST_FAILED for c in columns.values()) else 0,
    }


def _failures(column: Mapping[str, Any]) -> float:
    """The share of a column's samples that failed in it, and not upstream."""
    return (column["failed"] - column["reasons"].get("upstream", 0)) / max(column["in"], 1)


def text(summary: Mapping[str, Any]) -> Iterator[str]:
    """A summary of `to_corpus` as lines for people."""
    units, columns = summary["units"], summary["columns"]
    if not summary["written"] and not summary["set_aside"]:
        yield "nothing to do: all of it is there"
    yield (
        f"corpus {summary['corpus']}, source {summary['source']}: {units['read']:,} of {units['total']:,} MDS shards, "
        f"{summary['inputs'] - summary['unread']:,} of {summary['inputs']:,} samples"
    )
    width = max(map(len, columns))
    for name, column in columns.items():
        yield f"{name:{width}}  {column['in']:>11,} in = {column['out']:>11,} out + {column['failed']:>9,} failed"
    for name, column in columns.items():
        own = [f"{reason} {count:,}" for reason, count in column["reasons"].items() if reason != "upstream"]
        if own:
            yield f"{name}: failed for {', '.join(own)}"
        if _failures(column) > MOST_FAILED:
            yield f"{name}: {_failures(column):.1%} of its samples failed; are the shapes and the encoder right?"
    for entry in summary["set_aside"]:
        yield f"not read, {entry['samples']:,} samples: {entry['message']}"
    if summary["set_aside"]:
        yield "mend those files, and the same command takes them again"
    if summary["left_out"]:
        yield f"columns that were not taken: {', '.join(summary['left_out'])}"
    if summary["unchecked"]:
        yield f"hashes that were not checked, for want of a package (xxhash): {', '.join(summary['unchecked'])}"
