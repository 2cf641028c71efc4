"""Join tables of the datasets' own sizes: how long they take to build and to ask, and how much memory.

    python benchmarks/joins.py [--rows 14000000] [--entries 10000000] [--folder DIR] [--json]

Synthetic, in the published layouts: DiffusionDB's metadata (a Parquet file of 13 columns, 1,000 rows a part, in any
order) and SA-1B's captions (a tar.gz of `sa_<number>.txt` of some 600 bytes, in any order). Each is made at half the
size first, so that the slope shows. Building, and the look-ups of three units (1,000 names of a part; 11,186 numbers in
a row), run in processes of their own, whose memory is told. Goal: below 2,000 MB.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.files.find import list_files
from microdit.pipeline.tables.joins.build import build
from microdit.pipeline.tables.joins.lookup import Joined
from microdit.pipeline.tables.joins.spec import JoinSpec

PART, UNIT, UNITS = 1000, 11_186, 3
CHUNK = 100_000
TEXT = "a red apple on the old wooden table of my aunt, oil on canvas, trending in 1890, highly detailed"
WORDS = np.array(TEXT.split())
KNOWN = ("prompt", "width", "height", "image_nsfw", "prompt_nsfw")


def metadata(path: Path, rows: int) -> None:
    """Make DiffusionDB's metadata parquet; the names of part p are uuid5 of `p/number`."""
    random_rows, writer = np.random.default_rng(0), None
    parts = np.random.default_rng(1).permutation(rows // PART)
    for start in range(0, len(parts), CHUNK // PART):
        some = parts[start : start + CHUNK // PART]
        count = len(some) * PART
        words = WORDS[random_rows.integers(0, len(WORDS), (count, 18))]
        columns = {
            "image_name": [name_of(part, number) for part in some for number in range(PART)],
            "prompt": [" ".join(row) for row in words],
            "part_id": pa.array(np.repeat(some + 1, PART), pa.uint16()),
            "seed": pa.array(random_rows.integers(0, 2**32, count), pa.uint32()),
            "step": pa.array(np.full(count, 50), pa.uint16()),
            "cfg": pa.array(np.full(count, 7.0), pa.float32()),
            "sampler": pa.array(np.full(count, 8), pa.uint8()),
            "width": pa.array(np.full(count, 512), pa.uint16()),
            "height": pa.array(np.full(count, 512), pa.uint16()),
            "user_name": [f"{n:064x}" for n in random_rows.integers(0, 10_000, count)],
            "timestamp": pa.array(random_rows.integers(1_659_000_000, 1_660_000_000, count), pa.timestamp("s", "UTC")),
            "image_nsfw": pa.array(random_rows.random(count), pa.float32()),
            "prompt_nsfw": pa.array(random_rows.random(count), pa.float32()),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def name_of(part: int, number: int) -> str:
    return f"{uuid.UUID(int=(int(part) * 7919 + number * 104_729) * 0x9E3779B97F4A7C15 % 2**128)}.webp"


def captions(path: Path, entries: int) -> None:
    """Make SA-1B's captions; sa_<n>.txt begins with its number."""
    order = np.random.default_rng(2).permutation(entries)
    text = " ".join(WORDS[np.random.default_rng(3).integers(0, len(WORDS), 110)])
    with gzip.open(path, "wb", compresslevel=1) as file:
        for start in range(0, entries, 4096):
            block = bytearray()
            for number in order[start : start + 4096]:
                data = f"{number} {text[number % 97 :]}".encode()
                block += header(f"./sa_{number}.txt", len(data)) + data + bytes(-len(data) % 512)
            file.write(block)
        file.write(bytes(1024))


def header(name: str, size: int) -> bytes:
    """Make a tar member's header; tarfile's own takes ten times as long."""
    fields = (f"{name}".encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", f"{size:011o}\0".encode())
    rest = b"00000000000\0" + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    block = b"".join(fields) + rest
    return block[:148] + f"{sum(block):06o}\0 ".encode() + block[156:]


def spec_of(kind: str, path: Path) -> JoinSpec:
    listing = list_files(str(path), "table")
    if kind == "diffusiondb":
        return JoinSpec(listing, "parquet", "part_id/image_name", dict(zip(KNOWN, KNOWN, strict=True)))
    return JoinSpec(listing, "tar_txt", "", {"caption": "txt"}, "stem")


def task(name: str, kind: str, path: str, count: int, folder: str) -> dict[str, Any]:
    corpus = Corpus.create(f"{folder}/corpus", "joins", 4)
    spec = spec_of(kind, Path(path))
    began = time.perf_counter()
    if name == "build":
        build(corpus, spec, Path(folder) / "scratch", lambda note: print(note, file=sys.stderr))
        asked = count
    else:
        table, asked = Joined(corpus.store, spec), 0
        some = random.Random(4)
        for _ in range(UNITS):
            if kind == "diffusiondb":
                part = some.randrange(count // PART)
                keys = [f"{part + 1}/{name_of(part, number)}" for number in range(PART)]
            else:
                first = some.randrange(max(1, count - UNIT))
                keys = [f"sa_{number}" for number in range(first, min(count, first + UNIT))]
            for key in keys:
                found = table.get(key)
                assert found is not None and (kind == "diffusiondb" or found["caption"].startswith(key[3:] + " "))
            asked += len(keys)
    seconds = time.perf_counter() - began
    # not ru_maxrss: Linux hands that of the process that makes the tables on to those that it starts
    status = Path("/proc/self/status").read_text()
    memory = int(status.partition("VmHWM:")[2].split()[0]) * 1024 // 10**6
    return {"seconds": round(seconds, 1), "per_second": round(asked / seconds), "memory_mb": memory}


def measure(kind: str, count: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    path = folder / {"diffusiondb": "metadata-large.parquet", "sa1b": "SA1B_caption.tar.gz"}[kind]
    for size in (count // 2 // PART * PART, count // PART * PART):
        print(f"{kind}: making {size:,} rows", file=sys.stderr)
        (metadata if kind == "diffusiondb" else captions)(path, size)
        with tempfile.TemporaryDirectory(dir=folder) as corpus:
            for name in ("build", "look_up"):
                command = [sys.executable, __file__, "--task", name, kind, str(path), str(size), corpus]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                values = json.loads(done.stdout.splitlines()[-1])
                found |= {f"{kind}_{size}_{name}_{key}": value for key, value in values.items()}
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=14_000_000, help="of DiffusionDB's metadata")
    parser.add_argument("--entries", type=int, default=10_000_000, help="of SA-1B's captions")
    parser.add_argument("--folder", help="a folder on the disk to use (default: the system's temporary folder)")
    parser.add_argument("--task", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        name, kind, path, count, where = options.task
        print(json.dumps(task(name, kind, path, int(count), where)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind, count in (("diffusiondb", options.rows), ("sa1b", options.entries)):
            found |= measure(kind, count, Path(folder))
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
