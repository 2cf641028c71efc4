"""Make a corpus as `configs/microdit-37m.yaml` builds it, with made rows: what `benchmarks/full_size.py` measures on.

    python -m benchmarks.full_size_corpus FOLDER --rows N [--processes 2] [--json]

The five sources with their units, shards of 2,048 rows at most (1,400 on average), nine columns: images, three of
captions, `scores/basic`, two of latents, two of text. Commits, units and sidecars are written by the project's own
records and schemas, at less than full size in the same proportions. About 9% of the rows failed. Captions are made of
20,000 fragments of random words, hashes are skewed and some come again.

What is not there: the tars. That of the images has one small picture, which all its rows name, and those of latents and
text are not written at all; the sizes that commits say are those of real ones, their hashes are not. So what reads
tars (`verify` of these columns, `dedup --semantic`, a training step) finds nothing; all else reads what it would read.
"""

import argparse
import hashlib
import io
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import UNITS, column_kind, commit_name, shard_name, unit_name
from microdit.pipeline.corpus.records import Commit, InputRef, ObjectRef, UnitCommit
from microdit.pipeline.corpus.shard_files import TarWriter, sidecar_schema, write_table
from microdit.pipeline.stages.captions.asking import SCALARS as CAPTION
from microdit.pipeline.stages.ingest import SCALARS as IMAGE
from microdit.pipeline.stages.scores.pixels import SCALARS as BASIC

SHARD = 2048
SOURCES = {  # units at full size, and rows of each
    "sa1b": (1000, 11_200),
    "cc12m": (2176, 5_040),
    "textcaps": (1, 25_100),
    "journeydb": (200, 22_265),
    "diffusiondb": (14_000, 1_000),
}
FULL = sum(units * rows for units, rows in SOURCES.values())
SOURCE_CAPTIONS, LLAVANEXT, TASK2 = "captions/source", "captions/llavanext", "captions/task2"
COLUMNS: dict[str, tuple[dict[str, str], str, int]] = {  # scalars, input, bytes of a sample's data
    "images": (IMAGE, "", 60_000),
    SOURCE_CAPTIONS: (CAPTION, "images", 0),
    LLAVANEXT: (CAPTION, "images", 0),
    TASK2: (CAPTION, "images", 0),
    "scores/basic": (BASIC, "images", 0),
    "latents/sdxl-256": ({"absmax": "float32"}, "images", 8_192),
    "latents/sdxl-512": ({"absmax": "float32"}, "images", 32_768),
    "text/dfn-clip-h@source": ({"tokens": "int32"}, SOURCE_CAPTIONS, 157_696),
    "text/t5-xxl@source": ({"tokens": "int32"}, SOURCE_CAPTIONS, 300_000),
}
FAILED = {"sa1b": 0.11, "cc12m": 0.02, "textcaps": 0.0, "journeydb": 0.06, "diffusiondb": 0.12}
REASONS = {"diffusiondb": "nsfw", "cc12m": "too_small"}  # of others: no_caption
FRAGMENTS = {"sa1b": 4, "cc12m": 1, "textcaps": 1, "journeydb": 2, "diffusiondb": 1}  # of a caption
AGAIN, TWINS = 0.02, 20_000  # share of pictures that are one of so many, which come again and again
ATTEMPT = "20261101T000000-00000000"
TAR_HEAD = 512


@dataclass(frozen=True)
class Unit:
    """A unit to make: its source, its number and its rows."""

    source: str
    number: int
    rows: int

    @property
    def name(self) -> str:
        return unit_name(self.source, self.number)


def layout(rows: int) -> list[Unit]:
    """Divide rows as the config's sources have them: so many whole units of each, and what is left over."""
    units = []
    for source, (full_units, unit_rows) in SOURCES.items():
        left = max(2, round(full_units * unit_rows * rows / FULL))
        for number in range(math.ceil(left / unit_rows)):
            units.append(Unit(source, number, min(unit_rows, left)))
            left -= units[-1].rows
    return units


def make_corpus(folder: Path, rows: int, processes: int = 2) -> Corpus:
    """Make the corpus, or open it if it is there and whole."""
    corpus = Corpus.create(folder, "full-size", SHARD)
    for column, (scalars, _, _) in COLUMNS.items():
        corpus.declare_column(column, {"stage": "made", "column": column}, scalars)
    units = layout(rows)
    for source in SOURCES:
        stage = {"adapter": "made", "units": sum(unit.source == source for unit in units)}
        corpus.declare_source(source, stage)
    make_units(corpus, units, processes)
    return corpus


def grow(corpus: Corpus, rows: int, share: float = 0.01, processes: int = 2) -> int:
    """Add units of the last source, of about this share of the rows; returns how many rows were added."""
    source = list(SOURCES)[-1]
    first = sum(unit.source == source for unit in layout(rows))
    size = min(SOURCES[source][1], max(1, round(rows * share)))
    units = [Unit(source, first + number, size) for number in range(max(1, round(rows * share / size)))]
    make_units(corpus, units, processes)
    return sum(unit.rows for unit in units)


def make_units(corpus: Corpus, units: list[Unit], processes: int) -> None:
    """Make the units that are not committed, in several processes."""
    root = corpus.store.root
    assert root is not None
    there = {name for source in SOURCES for _, name in corpus.committed(UNITS, source)}
    for column, source in itertools.product([*COLUMNS, UNITS], SOURCES):
        (root / "commits" / column / source).mkdir(parents=True, exist_ok=True)
        (root / column / source).mkdir(parents=True, exist_ok=True)
    fingerprints = {column: corpus.column(column).fingerprint for column in COLUMNS}
    fingerprints |= {source: corpus.source(source).fingerprint for source in SOURCES}
    make = partial(make_unit, root, fingerprints)
    left = [unit for unit in units if unit.name not in there]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(make, left, chunksize=8):
            pass


# -- a unit ------------------------------------------------------------------------------------------------------------
def make_unit(root: Path, fingerprints: dict[str, str], unit: Unit) -> None:
    """Write all shards of a unit, and its commit."""
    shards = []
    for number, start in enumerate(range(0, unit.rows, SHARD)):
        shards.append(shard_name(unit.name, number))
        make_shard(root, fingerprints, unit, shards[-1], start, min(SHARD, unit.rows - start))
    record = UnitCommit(
        source=unit.source, unit=unit.name, inputs=unit.rows, shards=shards, fingerprint=fingerprints[unit.source]
    )
    (root / commit_name(UNITS, unit.source, unit.name, 0)).write_bytes(record.to_bytes())


def make_shard(root: Path, fingerprints: dict[str, str], unit: Unit, shard: str, start: int, rows: int) -> None:
    """Write the sidecars and commits of all columns of one shard."""
    seed = hashlib.sha256(f"{shard}/{start}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(seed, np.uint32))
    ok = rng.random(rows) >= FAILED[unit.source]
    keys = pa.array([f"{unit.number:06d}_{start + row:05d}" for row in range(rows)])
    values = _values(unit.source, rng, rows)
    made: dict[str, InputRef] = {}
    for column, (scalars, source_of, size) in COLUMNS.items():
        reason = REASONS.get(unit.source, "no_caption") if column == "images" else "upstream"
        sidecar = _sidecar(column, scalars, keys, ok, reason, values[column], size)
        inputs = [made[source_of]] if source_of else []
        commit = _write(root, fingerprints, unit, shard, column, sidecar, ok, reason, size, inputs)
        made[column] = commit.as_input()


def _sidecar(
    column: str, scalars: dict[str, str], keys: pa.Array, ok: np.ndarray, reason: str, values: dict[str, Any], size: int
) -> pa.Table:
    rows, good = len(ok), pa.array(ok)
    text, number = pa.scalar(None, pa.string()), pa.scalar(None, pa.int64())
    tar = column_kind(column) == "tar"
    offsets = np.full(rows, TAR_HEAD) if column == "images" else TAR_HEAD + np.cumsum(ok) * (size + TAR_HEAD)
    sizes = len(picture()) if column == "images" else size
    arrays: dict[str, Any] = {
        "row": pa.array(np.arange(rows, dtype=np.int32)),
        "key": keys,
        "status": pc.if_else(good, "ok", "failed"),
        "reason": pc.if_else(good, text, reason),
        "detail": pc.if_else(good, text, "it is left out by its source's own table"),
        "offset": pc.if_else(good, pa.array(offsets, pa.int64()), number) if tar else pa.nulls(rows, pa.int64()),
        "size": pc.if_else(good, pa.scalar(sizes, pa.int64()), number) if tar else pa.nulls(rows, pa.int64()),
    }
    schema = sidecar_schema(dict(sorted(scalars.items())))
    for name in scalars:
        kind = schema.field(name).type
        arrays[name] = pc.if_else(good, pc.cast(pa.array(values[name]), kind), pa.scalar(None, kind))
    return pa.table([arrays[name] for name in schema.names], names=schema.names).cast(schema)


def _write(
    root: Path,
    fingerprints: dict[str, str],
    unit: Unit,
    shard: str,
    column: str,
    sidecar: pa.Table,
    ok: np.ndarray,
    reason: str,
    size: int,
    inputs: list[InputRef],
) -> Commit:
    """Write the objects and the commit of one shard of a column, as bare files."""
    base, tar = f"{column}/{unit.source}/{shard}.{ATTEMPT}", column_kind(column) == "tar"
    name = f"{base}.rows.parquet" if tar else f"{base}.parquet"
    write_table(root / name, sidecar)
    data = (root / name).read_bytes()
    rows = ObjectRef(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    good, failed = int(ok.sum()), int((~ok).sum())
    if column == "images":
        (root / f"{base}.tar").write_bytes(picture_tar())
    commit = Commit(
        column=column,
        source=unit.source,
        unit=unit.name,
        shard=shard,
        generation=0,
        attempt=ATTEMPT,
        object=ObjectRef(name=f"{base}.tar", size=good * (size + 1024) + 10240, sha256="0" * 64) if tar else rows,
        sidecar=rows,
        counts={"in": len(ok), "out": good, "failed": failed},
        reasons={reason: failed} if failed else {},
        fingerprint=fingerprints[unit.source if column == "images" else column],
        inputs=inputs,
        timings={"seconds": 60.0, "cpu_seconds": 58.5},
        host="made",
        device="cpu",
    )
    stored = commit.to_bytes()
    (root / commit.name).write_bytes(stored)
    return commit


# -- made values -------------------------------------------------------------------------------------------------------
def _values(source: str, rng: np.random.Generator, rows: int) -> dict[str, dict[str, Any]]:
    """Make all scalars of a shard, by column."""
    captions = [words(rng, rows, FRAGMENTS[source])] * 3
    if source == "cc12m":
        captions[1] = words(rng, rows, 5)
    if source == "journeydb":
        captions[2] = words(rng, rows, 2)
    nsfw = [f"0.{number:04d}" for number in rng.integers(0, 2500, rows).tolist()]  # a fifth of them above 0.2
    fields = [f'{{"image_nsfw":"{score}","prompt_nsfw":"{score}"}}' for score in nsfw]
    others = ['{"id":"' + text + '"}' for text in nsfw]
    width, height = (rng.integers(256, 1024, rows).astype(np.int32) for _ in range(2))
    twin = np.where(rng.random(rows) < AGAIN, rng.integers(1, TWINS, rows, np.uint64), np.uint64(0))
    sizes = {"width": width // 2 + 256, "height": height // 2 + 256}
    values: dict[str, dict[str, Any]] = {
        "images": {
            "caption": captions[0],
            "origin": pc.binary_join_element_wise(f"https://{source}.example/pictures", pa.array(nsfw), "/"),
            "license": pa.repeat("research only", rows),
            "fields": fields if source == "diffusiondb" else others,
            **sizes,
            "original_width": width * 2,
            "original_height": height * 2,
            "format": pa.repeat("jpeg", rows),
            "sha256": digests(rng, rows, 4, np.zeros(rows, np.uint64)),
            "bytes": rng.integers(20_000, 100_000, rows),
        },
        "scores/basic": {name: rng.random(rows).astype(np.float32) * 200 for name in BASIC}
        | sizes
        | {"phash": digests(rng, rows, 1, twin), "pixels_sha256": digests(rng, rows, 4, twin)},
    }
    for column, caption in zip((SOURCE_CAPTIONS, LLAVANEXT, TASK2), captions, strict=True):
        values[column] = {"caption": caption, "tokens": pc.count_substring(caption, " ")}
    for column in COLUMNS:
        if column.startswith("latents/"):
            values[column] = {"absmax": rng.random(rows).astype(np.float32) * 4}
        elif column.startswith("text/"):
            values[column] = {"tokens": rng.integers(8, 77, rows).astype(np.int32)}
    return values


def words(rng: np.random.Generator, rows: int, parts: int) -> pa.Array:
    """Make captions of so many fragments."""
    pool = fragments()
    return pc.binary_join_element_wise(
        *(pool.take(pa.array(rng.integers(0, len(pool), rows))) for _ in range(parts)), " "
    )


@lru_cache(maxsize=1)
def fragments() -> pa.Array:
    """Make 20,000 runs of 8 to 20 made words, the same in every process."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    vocabulary = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 4000)])
    lengths = rng.integers(8, 20, 20_000)
    return pa.array([" ".join(vocabulary[rng.integers(0, 4000, length)]) for length in lengths])


def digests(rng: np.random.Generator, rows: int, words_each: int, twin: np.ndarray) -> pa.Array:
    """Make hashes of so many times 16 hex digits, some bits of which are skewed; those of a twin are its own."""
    numbers = rng.integers(0, 2**64, (rows, words_each), np.uint64)
    numbers &= rng.integers(0, 2**64, (rows, words_each), np.uint64) | np.uint64(0xFFFF_FFFF_0F0F_FF00)
    same = twin[:, None] * np.arange(0x9E3779B97F4A7C15, 0x9E3779B97F4A7C15 + words_each, dtype=np.uint64)
    numbers = np.where(twin[:, None] > 0, same, numbers)
    text = numbers.astype(">u8").tobytes().hex()
    size = 16 * words_each
    return pa.array([text[at : at + size] for at in range(0, len(text), size)])


@lru_cache(maxsize=1)
def picture() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@lru_cache(maxsize=1)
def picture_tar() -> bytes:
    """Make a tar with one picture, whose data begins at `TAR_HEAD`."""
    path = Path(f"/proc/self/fd/{os.memfd_create('tar')}")
    writer = TarWriter(path)
    assert writer.add("picture", {"jpg": picture()})[0] == TAR_HEAD
    writer.close()
    return path.read_bytes()


def objects(root: Path) -> Iterator[str]:
    """Name all files of a corpus, without its cached tables."""
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not name.startswith(("tables/", "selections/")):
            yield name


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, required=True, help="about so many")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options: argparse.Namespace = parser.parse_args()
    began = time.perf_counter()
    make_corpus(options.folder, options.rows, options.processes)
    units = layout(options.rows)
    shards = sum(math.ceil(unit.rows / SHARD) for unit in units)
    rows = sum(unit.rows for unit in units)
    found = {"rows": rows, "units": len(units), "shards": shards, "commits": shards * len(COLUMNS)}
    print_figures(found | {"seconds": round(time.perf_counter() - began, 1)}, options.json)


if __name__ == "__main__":
    main()
