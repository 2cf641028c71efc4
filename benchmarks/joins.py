"""Join tables at the size of the paper's: memory, time and rows a second of building and of look-ups.

    python benchmarks/joins.py [--rows 14000000] [--entries 10000000] [--folder DIR] [--json]

Two tables, made first and streamed to the disk: one in the shape of DiffusionDB's metadata (parquet, 13 columns, in no
order of its key) and one in that of SA-1B's captions (a tar.gz of files `sa_<number>.txt` of about 600 bytes). Each is
then built, in a process of its own, and asked unit by unit, in another: all 1,000 images of a zip, or all 11,186 of a
tar. Peak is the resident memory of that process, everything that it imports included. 0 leaves a table out.
"""

import argparse
import gzip
import json
import multiprocessing
import random
import resource
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus import Corpus
from pipeline.joins import Joined, JoinSpec, build
from pipeline.sources.remote import list_files

PART, TAR = 1000, 11_186  # images of a zip, and of a tar
UNITS = 20  # that are looked up
GROUP = 100_000  # rows of the metadata's row groups
WORDS = [
    "a",
    "the",
    "of",
    "in",
    "on",
    "red",
    "blue",
    "old",
    "woman",
    "man",
    "house",
    "tree",
    "detailed",
    "sky",
    "light",
]


# -- the tables ------------------------------------------------------------------------------------------------------


def text(rng: random.Random, characters: int) -> str:
    words: list[str] = []
    length = 0
    while length < characters:
        words.append(rng.choice(WORDS) if rng.random() < 0.7 else f"{rng.getrandbits(28):x}")
        length += len(words[-1]) + 1
    return " ".join(words)


def image_name(row: int) -> str:
    return f"{uuid.UUID(int=row * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128)}.webp"


def scattered(row: int, rows: int) -> int:
    """The rows in another order: a step that has no divisor with their number."""
    step = int(rows * 0.618) | 1
    while np.gcd(step, rows) != 1:
        step += 2
    return row * step % rows


def write_metadata(path: Path, rows: int) -> None:
    rng = random.Random(0)
    prompts = [text(rng, rng.randrange(20, 300)) for _ in range(20_000)]
    writer = None
    for start in range(0, rows, GROUP):
        numbers = [scattered(row, rows) for row in range(start, min(start + GROUP, rows))]
        count, draw = len(numbers), np.random.default_rng(start)
        table = pa.table(
            {
                "image_name": [image_name(number) for number in numbers],
                "prompt": [f"{prompts[number % 20_000]} {number // 4}" for number in numbers],
                "part_id": pa.array([number // PART + 1 for number in numbers], pa.uint16()),
                "seed": pa.array(draw.integers(0, 2**32, count, dtype=np.uint32)),
                "step": pa.array(draw.integers(10, 150, count, dtype=np.uint16)),
                "cfg": pa.array(draw.random(count, dtype=np.float32)),
                "sampler": pa.array(draw.integers(1, 9, count, dtype=np.uint8)),
                "width": pa.array(np.full(count, 512, np.uint16)),
                "height": pa.array(np.full(count, 512, np.uint16)),
                "user_name": [f"{number % 10_000:064x}" for number in numbers],
                "timestamp": pa.array(draw.integers(0, 2**31, count), pa.timestamp("s")).cast(
                    pa.timestamp("us", "UTC")
                ),
                "image_nsfw": pa.array([number % 1000 / 1000 for number in numbers], pa.float32()),
                "prompt_nsfw": pa.array(draw.random(count, dtype=np.float32)),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="snappy")
        writer.write_table(table, count)
    assert writer is not None
    writer.close()


def write_captions(path: Path, entries: int) -> None:
    rng = random.Random(0)
    some = [text(rng, rng.randrange(500, 700)).encode() for _ in range(20_000)]
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1, mtime=0) as file:
        for row in range(entries):
            number = scattered(row, entries)
            data = b"%b %d" % (some[number % 20_000], number)
            header = bytearray(512)
            for at, field in (
                (0, b"sa_%d.txt" % number), (100, b"0000644\0"), (124, b"%011o\0" % len(data)), (136, b"00000000000\0"),
                (148, b" " * 8), (156, b"0"), (257, b"ustar\x0000"),
            ):  # fmt: skip
                header[at : at + len(field)] = field
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(header + data + bytes(-len(data) % 512))
        file.write(bytes(1024))


# -- what is measured ------------------------------------------------------------------------------------------------


def spec_of(kind: str, folder: Path) -> JoinSpec:
    if kind == "metadata":
        fields = {name: name for name in ("prompt", "width", "height", "image_nsfw", "prompt_nsfw")}
        return JoinSpec(
            list_files(str(folder / "metadata.parquet"), "benchmark"), "parquet", "part_id/image_name", fields
        )
    return JoinSpec(list_files(str(folder / "captions.tar.gz"), "benchmark"), "tar_txt", "", {"caption": "txt"})


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make(kind: str, folder: Path, rows: int) -> None:
    if kind == "metadata":
        write_metadata(folder / "metadata.parquet", rows)
    else:
        write_captions(folder / "captions.tar.gz", rows)


def built(kind: str, folder: Path, rows: int) -> dict[str, float]:
    corpus, began = Corpus.open(folder / "corpus"), time.perf_counter()
    table = build(corpus, spec_of(kind, folder), folder / "scratch", lambda text: None)
    assert (table.rows, table.unreadable, table.repeated) == (rows, 0, 0)
    seconds = time.perf_counter() - began
    return {
        "build_seconds": round(seconds, 1),
        "build_rows_per_second": round(rows / seconds),
        "build_peak_mb": round(peak()),
        "table_mb": round(table.object.size / 2**20),
    }


def units(kind: str, rows: int) -> Iterator[list[tuple[str, int]]]:
    """The keys of some units, in the order in which an archive may have them, and their numbers."""
    size = PART if kind == "metadata" else TAR
    rng = random.Random(1)
    for first in sorted(rng.sample(range(0, max(rows - size, 1), 7), min(UNITS, max(rows // size, 1)))):
        first -= first % PART if kind == "metadata" else 0
        numbers = range(first, min(first + size, rows))
        keys = [
            (f"{number // PART + 1}/{image_name(number)}" if kind == "metadata" else f"sa_{number}", number)
            for number in numbers
        ]
        rng.shuffle(keys)
        yield keys


def looked_up(kind: str, folder: Path, rows: int) -> dict[str, float]:
    joined = Joined(Corpus.open(folder / "corpus").store, spec_of(kind, folder))
    asked, seconds, longest = 0, 0.0, 0.0
    for keys in units(kind, rows):
        began = time.perf_counter()
        found = [joined.get(key) for key, _ in keys]
        took = time.perf_counter() - began
        asked, seconds, longest = asked + len(keys), seconds + took, max(longest, took)
        for (_, number), fields in zip(keys, found, strict=True):
            assert fields is not None
            text = fields["prompt" if kind == "metadata" else "caption"]
            assert text.endswith(f" {number // 4 if kind == 'metadata' else number}")
    return {
        "unit_seconds": round(longest, 3),
        "lookups_per_second": round(asked / seconds),
        "lookup_peak_mb": round(peak()),
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call in a process of its own, whose memory is then that of nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=14_000_000, help="of the metadata")
    parser.add_argument("--entries", type=int, default=10_000_000, help="of the captions' archive")
    parser.add_argument("--folder", help="where to write all this (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    for kind, rows in (("metadata", options.rows), ("captions", options.entries)):
        if not rows:
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            folder = Path(place)
            Corpus.create(folder / "corpus", "benchmark")
            began = time.perf_counter()
            alone(make, kind, folder, rows)
            seconds = time.perf_counter() - began
            file = next(path for path in folder.iterdir() if path.is_file())
            found[kind] = {
                "rows": rows,
                "file_mb": round(file.stat().st_size / 2**20),
                "made_seconds": round(seconds, 1),
            }
            found[kind] |= alone(built, kind, folder, rows) | alone(looked_up, kind, folder, rows)
    if options.json:
        print(json.dumps(found))
        return
    for kind, figures in found.items():
        print(kind)
        for name, value in figures.items():
            print(f"  {name:24} {value:,}")


if __name__ == "__main__":
    main()
