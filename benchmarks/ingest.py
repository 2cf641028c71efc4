"""Measure ingest beside the decoding: `ingest_unit` on CC12M's tars against the bare loop over the same tars.

    python benchmarks/ingest.py [--tars 2] [--samples 200] [--rounds 5] [--threads 2] [--json]

Tars as pixparse/cc12m-wds has them (`<nine digits>.jpg`, `.txt`, `.json`), of drawn JPEGs whose sides have 300 to 1500
pixels: noise of every grain, coarse stronger than fine as in photographs, and shapes. The bare loop reads a tar with
`tarfile`, decodes (at a fraction of the size where that is enough), resizes, encodes what was changed, on as many
threads, and writes a tar of JPEGs: no check of what is untrusted, no caption, no checksum, no sidecar, no commit.
Both give the same JPEGs, which is checked. In turns; medians. `ratio_bare` is the bare loop's seconds by ingest's;
goal: at least 0.85. `ratio_cpu` is the same of processor seconds, which depend less on what else the machine does.
"""

import io
import json
import os
import random
import statistics
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.harness import argument_parser, print_figures
from benchmarks.photographs import photograph
from microdit.pipeline.config.build import BuildConfig, Resources
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.config.sources import Cc12mSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.sources.adapters.cc12m import Cc12m
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare
from microdit.pipeline.stages.stage import UnitTask

GOAL = 0.85
OPTIONS = ImageOptions()


def write_tars(folder: Path, tars: int, samples: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    folder.mkdir()
    for number in range(tars):
        with tarfile.open(folder / f"cc12m-train-{number:04d}.tar", "w") as tar:
            for place in range(samples):
                key = f"{number * samples + place:09d}"
                about = {"key": key, "url": f"https://example.org/{key}.jpg", "caption": f"picture {key}"}
                texts = {"json": json.dumps(about).encode(), "txt": f"A picture, the one of {key}.".encode()}
                for extension, data in ({"jpg": photograph(rng)} | texts).items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def bare_image(data: bytes) -> bytes:
    """Make a JPEG with a short side of `OPTIONS.max_side` pixels at most, as short as it can be written."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    side = OPTIONS.max_side or 0
    if min(width, height) < OPTIONS.min_side:
        raise ValueError("too small")
    enough = side * 5 // 2
    if min(width, height) <= side:
        simplejpeg.decode_jpeg(data)  # whether it is whole
        return data
    if min(width, height) >= 2 * enough:
        pixels = simplejpeg.decode_jpeg(data, min_height=enough, min_width=enough, min_factor=2)
    else:
        pixels = simplejpeg.decode_jpeg(data)
    scale = round(8 * pixels.shape[0] / height) / 8
    size = (side, side * height // width) if width <= height else (side * width // height, side)
    box = (0, 0, width * scale, height * scale)
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box))
    return simplejpeg.encode_jpeg(resized, quality=OPTIONS.quality, colorspace="RGB", colorsubsampling="444")


def bare(tars: Path, made: Path, threads: int) -> float:
    """Measure the seconds for all tars."""
    made.mkdir()
    began = time.perf_counter()
    for path in sorted(tars.iterdir()):
        with (
            tarfile.open(path) as tar,
            tarfile.open(made / path.name, "w") as out,
            ThreadPoolExecutor(threads) as pool,
        ):
            infos = [info for info in tar if info.name.endswith(".jpg")]
            datas = [file.read() for info in infos if (file := tar.extractfile(info)) is not None]
            for info, data in zip(infos, pool.map(bare_image, datas), strict=True):
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return time.perf_counter() - began


def built(tars: Path, root: Path, threads: int) -> float:
    """Measure the seconds for all tars, with ingest."""
    options = Cc12mSource(adapter="cc12m", files=str(tars / "cc12m-train-*.tar"))
    config = BuildConfig(
        name="ingest",
        corpus=str(root),
        sources={"cc12m": options},
        images=OPTIONS,
        resources=Resources(decode_threads=threads),
    )
    source = Cc12m("cc12m", options, root.parent / "scratch")
    corpus = Corpus.create(root, "ingest")
    declare(corpus, config, [source], [])
    began = time.perf_counter()
    for unit in source.units():
        ingest_unit(corpus, source, UnitTask(unit), config)
    return time.perf_counter() - began


def compare(made: Path, root: Path) -> int:
    """Count the JPEGs that the two gave, which must be the same ones.

    Raises:
        AssertionError: they are not.
    """
    plain: dict[str, bytes] = {}
    for path in sorted(made.iterdir()):
        with path.open("rb") as file:
            plain |= {key: members["jpg"] for key, members in read_tar(file)}
    corpus = Corpus.open(root)
    stored: dict[str, bytes] = {}
    for commit in corpus.commits(IMAGES):
        assert commit.counts["failed"] == 0, commit.reasons
        with corpus.open_object(commit) as file:
            stored |= {key: members["jpg"] for key, members in read_tar(file)}
    assert list(plain) == list(stored)
    different = [key for key in plain if plain[key] != stored[key]]
    assert not different, f"{len(different)} of {len(plain)} differ, such as {different[:3]}"
    return len(plain)


def measure(tars: int, samples: int, rounds: int, threads: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {"bare": [], "ingest": []}
    worked: dict[str, list[float]] = {"bare": [], "ingest": []}
    with tempfile.TemporaryDirectory() as folder:
        write_tars(given := Path(folder, "given"), tars, samples)
        size = sum(path.stat().st_size for path in given.iterdir())
        for number in range(rounds + 1):  # the first one to warm up
            made, root = Path(folder, f"bare-{number}"), Path(folder, f"corpus-{number}")
            for name in ("bare", "ingest") if number % 2 else ("ingest", "bare"):
                before = time.process_time()
                took = bare(given, made, threads) if name == "bare" else built(given, root, threads)
                if number:
                    times[name].append(took)
                    worked[name].append(time.process_time() - before)
            same = compare(made, root)
    plain, ours = (statistics.median(took) for took in times.values())
    plain_cpu, our_cpu = (statistics.median(took) for took in worked.values())
    return {
        "images": same,
        "megabytes": round(size / 1e6, 1),
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
        "rounds": rounds,
        "bare_seconds": round(plain, 3),
        "ingest_seconds": round(ours, 3),
        "images_per_second": round(same / ours, 1),
        "ratio_bare": round(plain / ours, 4),
        "bare_cpu_seconds": round(plain_cpu, 3),
        "ingest_cpu_seconds": round(our_cpu, 3),
        "ratio_cpu": round(plain_cpu / our_cpu, 4),
        "ratios": [round(a / b, 3) for a, b in zip(times["bare"], times["ingest"], strict=True)],
        "goal": GOAL,
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--tars", type=int, default=2)
    parser.add_argument("--samples", type=int, default=200, help="images in each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="that decode, in both")
    options = parser.parse_args()
    found = measure(options.tars, options.samples, options.rounds, options.threads)
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
