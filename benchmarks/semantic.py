"""Groups of millions of embeddings that lie in a file: seconds, memory, and whether planted copies are found.

    python -m benchmarks.semantic [--vectors 2000000] [--width 768] [--similarity 0.95] [--folder DIR] [--json]

Made vectors: 10,000 directions, of each vectors with a cosine of about 0.8 to it, and of 2% of all a copy with a cosine
of about 0.97. What `microdit dedup --semantic` does with them after it has read them: clusters, links, and what is
kept. Memory is what the process holds beside pages of the file. Comparing
within clusters grows with the vectors, finding the clusters of a vector with vectors times clusters: with their square.
"""

import argparse
import os
import re
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.curation.greedy import nearest_kept
from microdit.pipeline.curation.semantic import groups, similar

DIRECTIONS, COPIES, PART = 10_000, 0.02, 1 << 15


def write(path: Path, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Write the vectors; returns where the copies are, and of what."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((DIRECTIONS, width), np.float32) / np.sqrt(width)
    vectors = np.memmap(path, np.float16, "w+", shape=(count, width))
    copies, plain = int(count * COPIES), count - int(count * COPIES)
    originals = np.sort(rng.choice(plain, copies, replace=False))
    for start in [*range(0, plain, PART), *range(plain, count, PART)]:  # copies are of what is written
        end = min(start + PART, plain if start < plain else count)
        noise = rng.standard_normal((end - start, width), np.float32) / np.sqrt(width)
        if start < plain:
            part = 0.8 * centres[rng.integers(0, DIRECTIONS, end - start)] + 0.6 * noise
        else:
            part = 0.97 * vectors[originals[start - plain : end - plain]] + 0.24 * noise
        vectors[start:end] = part / np.linalg.norm(part, axis=1, keepdims=True)
    vectors.flush()
    return np.arange(plain, count), originals


def held() -> int:
    """Measure the bytes that this process holds for itself."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(size) for size in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status))


def measure(folder: Path, count: int, width: int, similarity: float) -> dict[str, Any]:
    path = folder / "vectors"
    copies, originals = write(path, count, width)
    vectors = np.memmap(path, np.float16, "r", shape=(count, width))
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            most[0] = max(most[0], held())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, worked = time.perf_counter(), time.process_time()
    labels, clusters, cut = groups(vectors, similarity)
    linked = time.perf_counter() - began
    chosen = nearest_kept(labels, np.ones(count, np.int64), partial(similar, vectors, similarity))
    ended.set()
    return {
        "vectors": count,
        "width": width,
        "cores": len(os.sched_getaffinity(0)),
        "clusters": clusters,
        "linked_seconds": round(linked, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
        "memory_gib": round(most[0] / (1 << 30), 2),
        "cut": cut,
        "groups": chosen.count,
        "recall": round(float((chosen.keeper[copies] == chosen.keeper[originals]).mean()), 5),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--vectors", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--similarity", type=float, default=0.95)
    parser.add_argument("--folder", help="a folder with room for the vectors (default: a temporary one)")
    options: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), options.vectors, options.width, options.similarity)
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
