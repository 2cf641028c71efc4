"""Convert one MDS shard: a unit of the source, and the shards that it is cut into, column by column."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from microdit.pipeline.base.fail_points import fail_point
from microdit.pipeline.content.images import BadImage, prepare
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import write_failure
from microdit.pipeline.corpus.names import IMAGES, UNITS, commit_name, shard_name, unit_name
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.corpus.rows import Row, latest, read_lines
from microdit.pipeline.mds.columns import CAPTION, PICTURE, PICTURES, Arrays, Conversion, float16_array
from microdit.pipeline.mds.format import DamagedSample, DamagedShard, MdsShard, open_shard
from microdit.pipeline.stages.rows import usable_rows
from microdit.pipeline.stages.stage import Task

Redo = dict[str, set[str]]  # by column the shards, and with the column `units` the units, that are made again


@dataclass(frozen=True)
class ConvertedUnit:
    """Result of one unit: samples and bytes that were written, or why it could not be read (`message`)."""

    number: int
    samples: int = 0
    failed: int = 0
    bytes: int = 0
    message: str = ""


def shards_of(corpus: Corpus, conversion: Conversion, number: int) -> tuple[str, list[str]]:
    """Name a unit, and its shards."""
    unit = unit_name(conversion.naming.source, number)
    count = math.ceil(conversion.shards[number].samples / corpus.shard_samples)
    return unit, [shard_name(unit, i) for i in range(count)]


def convert_unit(corpus: Corpus, conversion: Conversion, number: int, redo: Redo) -> ConvertedUnit:
    """Write what is not committed of one MDS shard, or is made again, then the unit's commit."""
    info, source = conversion.shards[number], conversion.naming.source
    unit, names = shards_of(corpus, conversion, number)
    samples = failed = size = 0
    try:
        with open_shard(conversion.folder, info) as file:
            for i, shard in enumerate(names):
                first = i * corpus.shard_samples
                ref = ShardRef(source=source, unit=unit, shard=shard)
                if made := ShardConversion(corpus, conversion, redo, file, number, first, ref).convert():
                    samples += made[0].counts["in"]
                    failed += max(commit.counts["failed"] for commit in made)
                    size += sum(commit.size for commit in made)
    except DamagedShard as error:
        write_failure(corpus, UNITS, source, unit, stage="convert", attempts=1, message=str(error), traceback="")
        return ConvertedUnit(number, message=str(error))
    fail_point("committing-unit")
    if (generation := _generation(corpus, UNITS, source, unit, redo)) is not None:
        commit_unit(corpus, source, unit, info.samples, names, generation)
    return ConvertedUnit(number, samples, failed, size)


def _generation(corpus: Corpus, column: str, source: str, shard: str, redo: Redo) -> int | None:
    """Return the generation to write of a shard (or unit); None if nothing is to be written."""
    generation = 0
    while corpus.store.exists(commit_name(column, source, shard, generation)):
        generation += 1
    return generation if not generation or shard in redo.get(column, ()) else None


@dataclass(frozen=True)
class ShardConversion:
    """The samples of an MDS shard, from `first` on, that become the shard `ref`."""

    corpus: Corpus
    conversion: Conversion
    redo: Redo
    file: MdsShard
    number: int
    first: int
    ref: ShardRef

    def convert(self) -> list[Commit]:
        """Write the columns that are not committed, or are made again; returns the commits of this call."""
        made: list[Commit] = []
        for column in self.conversion.columns:  # in this order: each comes after the columns that it hangs on
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
        """Collect members and scalars of a sample of the images column; those of a picture are null without one."""
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
            for row in usable_rows(read_lines(self.corpus, inputs), {name: attempt}, task, upstream):
                data, scalars, reason, detail = self._array(row, column)
                if reason:
                    attempt.fail(row.row, row.key, reason, detail)
                else:
                    attempt.add(row.row, row.key, {"npy": data}, **scalars)
            return attempt.commit()

    def _array(self, row: Row, column: Arrays) -> tuple[bytes, dict[str, Any], str, str]:
        """Return a sample's member and scalars; or the reason and detail of its failure."""
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
