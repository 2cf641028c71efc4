"""Samples a second of one worker process: the trainer's loader beside stock webdataset and MosaicML Streaming.

    python benchmarks/loader.py [--samples 4096] [--width 1024] [--rounds 5] [--streaming-python PATH] [--json]

The same samples and bytes: latents (4, 32, 32) and text (8 to 72 tokens, 40 on average, `width` wide) in float16, and a
caption. Each way reads them all once, in batches, as tensors with padded text; that all three give the same is checked.
Ours gives what training gets: shuffled, verified by SHA-256, with the noise of each step; the others are asked for
neither. In turns, in one process each (ours reads ahead in threads, curl in one of its own); medians.

From a folder, and from an S3 server on loopback (benchmarks/file_s3.py); `server_mb_per_second` is what it gives a
reader who does nothing else, `s3_..._server` its processor seconds by the seconds of a run, taken from the same cores.
`ratio_webdataset` and `ratio_streaming` are our samples a second by theirs, the lower one of the two places; goal: 2.
`ragged` beside `padded`: ours on text that is stored at 72 tokens throughout.
`shuffle`: distance between neighbours of a shard, and of a source, by that of a uniform shuffle (1).
"""

import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
import webdataset

from benchmarks.harness import argument_parser, print_figures
from benchmarks.loader_streaming import batched, drain
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.selection.sample_index import SampleIndex
from microdit.trainer.data.batches import LegData
from microdit.trainer.data.order import Lanes
from microdit.trainer.data.samples import open_cache, open_samples
from microdit.trainer.recipe import Recipe
from tests.servers.s3 import environ, environment

GOAL = 2.0
LENGTHS = [16, 32, 40, 48, 56, 64, 72]
BATCH, LANES, WINDOW, SHARD = 128, 2, 2, 256
LATENTS, CAPTIONS = "latents/sdxl-256", "captions/source"
HERE = Path(__file__).parent


def write(root: Path, tars: Path, samples: int, width: int) -> None:
    """Write the corpus, with ragged and padded text, and the ragged one as tars of whole samples."""
    corpus = Corpus.create(root, "loader", SHARD)
    corpus.declare_source("made", {"adapter": "made-up"})
    corpus.declare_column("images", {"stage": "images"})
    corpus.declare_column(LATENTS, {"stage": "latents"})
    corpus.declare_column(CAPTIONS, {"stage": "captions"}, {"caption": "string"})
    for text in ("ragged", "padded"):
        corpus.declare_column(f"text/{text}@source", {"stage": "text"})
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1 << 22)).astype(np.float16)
    tars.mkdir()
    for number in range(samples // SHARD):
        shard = shard_name(unit_name("made", number), 0)
        ref = ShardRef(source="made", unit=unit_name("made", number), shard=shard)
        rows: list[tuple[Any, ...]] = []
        for row in range(SHARD):
            tokens, at = int(rng.integers(8, 73)), int(rng.integers(0, len(noise) - 4096 - 72 * width))
            ragged = noise[at : at + tokens * width].reshape(tokens, width)
            padded = np.concatenate([ragged, np.zeros((72 - tokens, width), np.float16)])
            latent = noise[at + 72 * width :][:4096].reshape(4, 32, 32)
            arrays = (array_bytes(array) for array in (latent, ragged, padded))
            rows.append((f"{shard}-{row}", *arrays, f"picture {number} {row}"))
        with begin_attempt(corpus, "images", ref) as attempt:
            for row, (key, *_) in enumerate(rows):
                attempt.add(row, key, {"png": b"-", "json": b"{}"})
            images = attempt.commit()
        with begin_attempt(corpus, CAPTIONS, ref, [images]) as attempt:
            for row, parts in enumerate(rows):
                attempt.add(row, parts[0], caption=parts[-1])
            captions = attempt.commit()
        for place, column, made in (
            (1, LATENTS, images),
            (2, "text/ragged@source", captions),
            (3, "text/padded@source", captions),
        ):
            with begin_attempt(corpus, column, ref, [made]) as attempt:
                for row, parts in enumerate(rows):
                    attempt.add(row, parts[0], {"npy": parts[place]})
                attempt.commit()
        with tarfile.open(tars / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, latent_file, text_file, _, caption in rows:
                for extension, data in (
                    ("latents.npy", latent_file),
                    ("text.npy", text_file),
                    ("txt", caption.encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def our_batches(url: str, text: str) -> Iterator[Any]:
    stage = {"latents": LATENTS, "steps": 1, "batch": BATCH, "learning_rate": 1.0}
    recipe = Recipe.model_validate(
        {
            "name": "loader", "corpus": url, "out": "unused", "lanes": LANES, "text": {f"text/{text}@source": 1},
            "shuffle_window": WINDOW, "text_lengths": LENGTHS, "caption_dropout": 0,
            "stages": [stage], "cache_mb": 4096,
        }
    )  # fmt: skip
    samples = open_samples(recipe)
    (index,) = samples.legs
    commits = {c.shard: c for c in samples.corpus.commits(CAPTIONS)}
    captions: dict[str, pa.ChunkedArray] = {}
    with closing(open_cache(recipe, samples)) as cache:
        data = LegData(recipe, recipe.stages[0], index, cache, 2)
        yield None  # open; the others, too, are timed from here
        for batch in data.batches(0, 0, len(index) // BATCH):
            (micro,) = batch.micro_batches
            keys, texts = [], []
            for position in batch.positions.tolist():
                shard, row = index.shards[index.shard[position]][1], int(index.row[position])
                if shard not in captions:
                    captions[shard] = samples.corpus.sidecar(commits[shard])["caption"].combine_chunks()
                keys.append(f"{shard}-{row}")
                texts.append(captions[shard][row].as_py())
            yield keys, micro.latents, micro.text, micro.text_mask, texts


def ours(url: str, check: bool = False, text: str = "ragged") -> dict[str, Any]:
    batches = our_batches(url, text)
    next(batches)
    return drain(batches, check)


def stock(urls: list[str], check: bool = False) -> dict[str, Any]:
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    samples = dataset.to_tuple("__key__", "latents.npy", "text.npy", "txt")
    return drain(batched(samples, BATCH, LENGTHS), check)


def streaming(python: str, url: str, server: str, check: bool = False) -> dict[str, Any]:
    command = [python, str(HERE / "loader_streaming.py"), "read", url, str(BATCH), json.dumps(LENGTHS)]
    done = subprocess.run(
        command + ["DIGESTS"] * check, env=os.environ | {"S3_ENDPOINT_URL": server}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def server_rate(server: str, folder: Path) -> float:
    """Measure the MB/s that the server gives four readers who do nothing with it."""
    urls = [f"{server}/bucket/tars/{path.name}" for path in sorted(folder.iterdir())]

    def size(url: str) -> int:
        with urlopen(url) as answer:
            return len(answer.read())

    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(size, urls))
    return total / (time.perf_counter() - began) / 1e6


def shuffle() -> dict[str, float]:
    """Shuffle 5,120 shards of 64 rows, a third of them of another source, in 128 lanes and a window of 4."""
    shards = sorted(("b" if n % 3 == 0 else "a", f"s{n:04d}") for n in range(5120))
    rows = np.tile(np.arange(64, dtype=np.int32), len(shards))
    index = SampleIndex(shards, np.repeat(np.arange(len(shards), dtype=np.int32), 64), rows)
    lanes = Lanes(index, 128, 0, 4)
    order = np.concatenate([lanes.batch(2048 * n, 2048)[1] for n in range(len(index) // 2048)])
    source = np.array([source == "b" for source, _ in shards])[index.shard].astype(np.int32)
    return {
        "samples": len(order),
        "shard": round(shuffle_quality(order, index.shard), 4),
        "shard_uniform_distance": round((len(order) + 1) / 65, 1),
        "source": round(shuffle_quality(order, source), 4),
    }


def shuffle_quality(order: np.ndarray, group: np.ndarray) -> float:
    """Mean distance in a sequence between a sample and the next one of its group, by what a uniform shuffle gives.

    order: positions in the sequence's order; group: of each position. 1 is as good as uniform, less is clumped.
    """
    groups = group[order]
    positions = np.argsort(groups, kind="stable")
    gaps = np.diff(positions)[np.diff(groups[positions]) == 0]
    counts = np.bincount(groups)
    counts = counts[counts > 1]
    # of n positions drawn from N the mean distance between neighbours is (N + 1) / (n + 1)
    uniform = ((len(order) + 1) / (counts + 1) * (counts - 1)).sum() / (counts - 1).sum()
    return math.nan if not len(gaps) else float(gaps.mean() / uniform)


def measure(samples: int, width: int, rounds: int, python: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        bucket = Path(name, "bucket")
        root, tars, mds = bucket / "corpus", bucket / "tars", bucket / "mds"
        bucket.mkdir()
        write(root, tars, samples, width)
        if python:
            subprocess.run(
                [python, HERE / "loader_streaming.py", "write", tars, mds], check=True, stdout=subprocess.DEVNULL
            )
        names = sorted(path.name for path in tars.iterdir())
        command = [sys.executable, str(HERE / "file_s3.py"), name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            server = f"http://127.0.0.1:{int(process.stdout.readline())}"
            try:
                with environ(environment(server)):
                    ways: dict[str, dict[str, Any]] = {
                        "folder": {
                            "ours": lambda check=False: ours(str(root), check),
                            "webdataset": lambda check=False: stock([str(tars / n) for n in names], check),
                            "padded": lambda check=False: ours(str(root), check, "padded"),
                        },
                        "s3": {
                            "ours": lambda check=False: ours("s3://bucket/corpus", check),
                            "webdataset": lambda check=False: stock(
                                [f"pipe:curl -sf {server}/bucket/tars/{n}" for n in names], check
                            ),
                        },
                    }
                    if python:
                        exe: str = python
                        ways["folder"]["streaming"] = lambda check=False: streaming(exe, str(mds), server, check)
                        ways["s3"]["streaming"] = lambda check=False: streaming(exe, "s3://bucket/mds", server, check)
                    rates = compare(ways, samples, rounds, process.pid)
                    rate = server_rate(server, tars)
            finally:
                process.kill()
        size = sum(path.stat().st_size for path in tars.iterdir())
    found: dict[str, Any] = {
        "samples": samples,
        "bytes_per_sample": size // samples,
        "width": width,
        "batch": BATCH,
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
    }
    for place, per_way in rates.items():
        for way, (wall, cpu, share) in per_way.items():
            found[f"{place}_{way}_per_second"], found[f"{place}_{way}_per_cpu_second"] = round(wall, 1), round(cpu, 1)
            if place == "s3":
                found[f"s3_{way}_server"] = round(share, 3)
    for peer in ("webdataset", "streaming"):
        each = [p["ours"][0] / p[peer][0] for p in rates.values() if peer in p]
        found[f"ratio_{peer}"] = round(min(each), 3) if each else "not measured"
        found[f"ratios_{peer}"] = [round(ratio, 3) for ratio in each] if each else "not measured"
    found["ratio_ragged"] = round(rates["folder"]["ours"][0] / rates["folder"]["padded"][0], 3)
    found["server_mb_per_second"] = round(rate, 1)
    found["ours_mb_per_second"] = round(rates["s3"]["ours"][0] * size / samples / 1e6, 1)
    return found | {"shuffle": shuffle(), "goal": GOAL}


def compare(
    ways: dict[str, dict[str, Any]], samples: int, rounds: int, server: int
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Measure samples a second, and a processor second, of each way on each store; and the server's processor time.

    Raises:
        AssertionError: two of them do not give the same samples.
    """
    rates: dict[str, dict[str, tuple[float, float, float]]] = {}
    for place, per_way in ways.items():
        rates[place] = {}
        checked = {way: run(check=True)["digest"] for way, run in per_way.items() if way != "padded"}
        assert len(set(checked.values())) == 1, f"{place}: the samples differ: {checked}"
        times: dict[str, list[tuple[float, float, float]]] = {way: [] for way in per_way}
        for number in range(rounds):
            for way in list(per_way)[:: 1 if number % 2 else -1]:
                worked = processor_seconds(server)
                run = per_way[way]()
                assert run["samples"] == samples, (place, way, run)
                share = (processor_seconds(server) - worked) / run["seconds"]
                times[way].append((run["seconds"], run["cpu"], share))
        for way, took in times.items():
            wall, cpu, share = (statistics.median(numbers) for numbers in zip(*took, strict=True))
            rates[place][way] = samples / wall, samples / cpu, share
    return rates


def processor_seconds(process: int) -> float:
    """Read a process' processor time so far from /proc."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=4096, help=f"a multiple of {SHARD}")
    parser.add_argument("--width", type=int, default=1024, help="channels of the text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streaming-python", metavar="PATH", help="of an environment with mosaicml-streaming")
    options = parser.parse_args()
    found = measure(options.samples, options.width, options.rounds, options.streaming_python)
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
