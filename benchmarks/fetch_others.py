"""Fetch a list with microdit or img2dataset in processes of their own, for `benchmarks/fetch.py`."""

import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.config.sources import FetchOptions, UrlsSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.sources.adapters.urls import Urls
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare
from microdit.pipeline.stages.stage import UnitTask

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "microdit" / "benchmarks"
VERSION = "1.47.0"
QUALITY = 95
SIDE = 256
WORKERS = 2

IMG2DATASET = """
import json, sys
from img2dataset import download
if __name__ == "__main__":
    download(**json.loads(sys.argv[1]))
"""


@dataclass(frozen=True)
class Run:
    """Hold the cost of a fetched list: seconds from the first begin to the last end, and processor seconds."""

    images: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.images / self.seconds


def img2dataset_python() -> Path:
    """Return the interpreter of an environment with img2dataset, which is made once, with pip from the registry."""
    python = CACHE / f"img2dataset-{VERSION}" / "bin" / "python"
    check = [str(python), "-c", "import img2dataset"]
    if not python.exists() or subprocess.run(check, capture_output=True).returncode:
        shutil.rmtree(python.parents[1], ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        install = [str(python), "-m", "pip", "install", "-q", f"img2dataset=={VERSION}"]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return python


def environment(certificate: Path) -> dict[str, str]:
    """Return the environment of both: one thread for each library, and a certificate that is trusted."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "NO_ALBUMENTATIONS_UPDATE"), "1")
    root = str(Path(__file__).parents[1])
    return {**os.environ, **one, "SSL_CERT_FILE": str(certificate), "PYTHONPATH": root}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Img2dataset:
    """Run img2dataset; its start, which is measured with an empty run, is no part of its processor time."""

    name = "img2dataset"

    def __init__(self, certificate: Path, folder: Path):
        self._python, self._environment = img2dataset_python(), environment(certificate)
        self._folder = folder
        self._start = 0.0

    def measure_start(self, url: str) -> None:
        one = self._folder / "one.tsv"
        one.write_text(f"url\tcaption\n{url}/0.jpg\tone\n{url}/1.jpg\ttwo\n")
        self._start = self.run(one, "keep", 4, 1).cpu

    def run(self, listed: Path, mode: str, concurrency: int, shard: int, retries: int = 0) -> Run:
        made = self._folder / "img2dataset"
        options: dict[str, Any] = {
            "url_list": str(listed),
            "output_folder": str(made),
            "processes_count": WORKERS,
            "thread_count": concurrency,
            "input_format": "tsv",
            "url_col": "url",
            "caption_col": "caption",
            "output_format": "webdataset",
            "number_sample_per_shard": shard,
            "retries": retries,
            "resize_mode": "keep_ratio" if mode.startswith("resize") else "no",
            "image_size": SIDE,
            "encode_quality": QUALITY,
            "resize_only_if_bigger": True,
            "disable_all_reencoding": not mode.startswith("resize"),
        }
        before = _children()
        subprocess.run(
            [self._python, self._script(), json.dumps(options)],
            env=self._environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        cpu = _children() - before - self._start
        stats = [json.loads(path.read_text()) for path in made.glob("*_stats.json")]
        seconds = max(one["end_time"] for one in stats) - min(one["start_time"] for one in stats)
        return Run(sum(one["successes"] for one in stats), seconds, cpu)

    def _script(self) -> Path:
        path = self._folder / "run_img2dataset.py"
        path.write_text(IMG2DATASET)
        return path

    def clear(self) -> None:
        shutil.rmtree(self._folder / "img2dataset", ignore_errors=True)


class Microdit:
    """Run ingest in worker processes, as a build does: decoded, checked, written to shards, committed."""

    name = "microdit"

    def __init__(self, certificate: Path, folder: Path):
        self._environment, self._folder = environment(certificate), folder

    def run(self, listed: Path, mode: str, concurrency: int, shard: int) -> Run:
        root = self._folder / "microdit"
        config = _config(root, listed, mode, concurrency, shard)
        corpus = Corpus.create(root, "fetch")
        source = _source(config)
        declare(corpus, config, [source], [])
        jobs = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.fetch_others", config.model_dump_json(), str(number), mode],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for number in range(WORKERS)
        ]
        for job in jobs:
            assert job.stdout is not None
            job.stdout.readline()  # it has started
        for job in jobs:
            assert job.stdin is not None
            job.stdin.write(b"go\n")
            job.stdin.flush()
        done = [json.loads(job.communicate()[0]) for job in jobs]
        seconds = max(one["ended"] for one in done) - min(one["began"] for one in done)
        return Run(sum(one["images"] for one in done), seconds, sum(one["cpu"] for one in done))

    def clear(self) -> None:
        shutil.rmtree(self._folder / "microdit", ignore_errors=True)


def _config(root: Path, listed: Path, mode: str, concurrency: int, shard: int) -> BuildConfig:
    fetch = FetchOptions(concurrency=concurrency, allow_networks=["127.0.0.0/8"], contact="me@example.org")
    options = UrlsSource(adapter="urls", list=str(listed), unit_inputs=shard, fetch=fetch)
    side = SIDE if mode.startswith("resize") else None
    reduce: Literal["fast", "sharp"] = "fast" if mode == "resize_fast" else "sharp"
    images = ImageOptions(min_side=1, max_side=side, quality=QUALITY, reduce=reduce)
    return BuildConfig(name="fetch", corpus=str(root), sources={"urls": options}, images=images)


def _source(config: BuildConfig) -> Urls:
    options = config.sources["urls"]
    assert isinstance(options, UrlsSource)
    return Urls("urls", options.list, options.unit_inputs, options.fetch)


def work(config: BuildConfig, number: int, mode: str) -> dict[str, float]:
    """Ingest every `WORKERS`th unit; in the mode `fetch` write the bytes into tars, as img2dataset does."""
    source, corpus = _source(config), Corpus.open(config.corpus)
    print("started", flush=True)
    sys.stdin.readline()
    began, cpu, images = time.time(), time.process_time(), 0

    def count(commit: Commit) -> None:
        nonlocal images
        images += commit.counts["out"]

    for unit in source.units()[number::WORKERS]:
        if mode == "fetch":
            images += write_tar(source, unit, Path(config.corpus) / f"{unit}.tar")
        else:
            ingest_unit(corpus, source, UnitTask(unit), config, count)
    return {"began": began, "ended": time.time(), "cpu": time.process_time() - cpu, "images": images}


def write_tar(source: Urls, unit: str, path: Path) -> int:
    """Write what comes of a unit, with its SHA-256 and caption beside; return the number of pictures."""
    images = 0
    with tarfile.open(path, "w") as tar:
        for item in source.read(unit, lambda _: True):
            if item.data is not None:
                about = {"url": item.origin, "caption": item.caption, "sha256": hashlib.sha256(item.data).hexdigest()}
                for extension, data in (("jpg", item.data), ("json", json.dumps(about).encode())):
                    info = tarfile.TarInfo(f"{item.key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                images += 1
    return images


if __name__ == "__main__":
    print(json.dumps(work(BuildConfig.model_validate_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
