"""Plan a Parquet list of many URLs: seconds, and memory above that of the imports.

    python -m benchmarks.fetch_list [--rows 1000000] [--json]

The list is copied as JSON lines into a scratch folder and cut into units, and the last unit is read without fetching.
Goals: seconds, and memory that does not grow with the list.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.sources.adapters.urls import Urls
from microdit.pipeline.sources.list_columns import ListColumns

GROUP = 100_000
WRITE = "import sys; from benchmarks.fetch_list import write; write(sys.argv[1], int(sys.argv[2]))"


def write(path: str, rows: int) -> None:
    """Write the list, in a process of its own, whose memory is not counted."""
    schema = pa.schema({"url": pa.string(), "caption": pa.string(), "similarity": pa.float64()})
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, GROUP):
            numbers = range(first, min(first + GROUP, rows))
            columns = {
                "url": [f"https://host{n % 1000}.example.org/images/{n:09d}.jpg" for n in numbers],
                "caption": [f"a caption of some words about picture number {n}" for n in numbers],
                "similarity": [n / rows for n in numbers],
            }
            writer.write_table(pa.table(columns, schema))


def peak() -> float:
    """Most resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plan(folder: Path, rows: int) -> dict[str, Any]:
    """Plan the list, and read its last unit."""
    path, before = folder / "list.parquet", peak()
    columns = ListColumns(more=(("fields.similarity", "similarity"),))
    began = time.monotonic()
    source = Urls("web", path, 4096, FetchOptions(), columns=columns, scratch=folder / "scratch")
    planned = time.monotonic()
    last = list(source.read(source.units()[-1], lambda _: False))
    assert source.stage()["inputs"] == rows and last[-1].origin.endswith(f"{rows - 1:09d}.jpg")
    return {
        "rows": rows,
        "seconds": round(planned - began, 1),
        "last_unit_seconds": round(time.monotonic() - planned, 2),
        "memory_mb": round(peak() - before),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", WRITE, str(Path(folder) / "list.parquet"), str(options.rows)]
        subprocess.run(command, check=True)
        print_figures(plan(Path(folder), options.rows), options.json)


if __name__ == "__main__":
    main()
