"""Encoding: our stages beside the bare model, the loop that most people write, and the bare decode and resize.

    python -m benchmarks.encode [--device cuda] [--models sdxl t5-xxl dfn-clip-h] [--shards 4] [--samples 512] [--json]

Runs in a folder of the sources with torch, diffusers, transformers, tokenizers, safetensors, huggingface_hub, numpy,
pillow, simplejpeg, obstore, pyarrow, pydantic, pyyaml, ftfy, regex; without ray, duckdb and what fetches.

Inputs are JPEGs that `benchmarks/photographs.py` draws, stored as ingest stores them (short side at most 512 pixels),
and captions of a few to a hundred words. Models of the real sizes have random weights, written into folders and
loaded as any other. In turns, medians:

    bare     the network alone on ready tensors on the device, at the best of some batch sizes: the ceiling
    stage    `pipeline.stages`, from committed tars (tables) to committed tars, several shards; loading is not counted
    common   Pillow, a DataLoader, eager, autocast where ours is in half precision, one tar; captions padded to the
             longest that there may be; at the best of some batch sizes and workers; its output is ours within TOLERANCE
    feed     our image stage with a model that does nothing; `bare feed` decodes and resizes as much on as many threads

`ratio_ceiling` = bare / stage, goal 0.95 on a GPU with 16 cores beside it; `ratio_common` = common / stage, goal 2;
`ratio_feed` = bare feed / feed, goal 0.85: ratios of seconds, of all models together and of each. `gpu_busy` is the
share of the stage's time in which the GPU had a batch to work on. `ratio_..._cpu` are of processor seconds, which say
more where the processor is the device and has other things to do. What was not measured says so.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.encode_inputs import CAPTIONS, MODELS, SIZES, make_corpus
from benchmarks.encode_others import Plain, arrays, bare_feed, common_images, common_text, difference, without_model
from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.encoders import LatentsColumn, TextColumn
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.corpus.rows import read_lines, read_rows
from microdit.pipeline.stages.latents import Latents
from microdit.pipeline.stages.rows import image_bytes
from microdit.pipeline.stages.stage import Task
from microdit.pipeline.stages.text import Text

GOALS = {"ratio_ceiling": 0.95, "ratio_common": 2.0, "ratio_feed": 0.85}
TOLERANCE = 0.05  # mean difference by mean magnitude: half precision, and resizing that rounds otherwise
NOT_MEASURED = "not measured"
DEFAULT = {"cuda": ["sdxl", "t5-xxl", "dfn-clip-h"], "cpu": ["demo", "minilm", "t5-small"]}


# -- timing ------------------------------------------------------------------------------------------------------------
@dataclass
class Setting:
    """One measurement: a model, a resolution and a device."""

    corpus: Corpus
    folder: Path
    device: str
    threads: int
    batch: int
    tries: int = 0

    @property
    def refs(self) -> list[ShardRef]:
        return [commit.ref for commit in self.corpus.commits(IMAGES)]

    @property
    def images(self) -> list[bytes]:
        return [image_bytes(r.members) for c in self.corpus.commits(IMAGES) for r in read_rows(self.corpus, c)]

    @property
    def texts(self) -> list[str]:
        return [r.scalars["caption"] for c in self.corpus.commits(CAPTIONS) for r in read_lines(self.corpus, c)]

    def time(self, work: Callable[[], object]) -> "Took":
        began, worked = self._now()
        work()
        ended, then = self._now()
        return Took(ended - began, then - worked)

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(used.ru_utime + used.ru_stime for used in usage)


@dataclass(frozen=True)
class Took:
    """Seconds of the clock, and of the processors in this process and those that it started."""

    clock: float
    cpu: float


@dataclass
class Found:
    """Of one model: what each way took for the whole corpus, and what else was seen."""

    took: dict[str, list[Took]] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)

    def add(self, way: str, took: Took) -> None:
        self.took.setdefault(way, []).append(took)

    def median(self, way: str, kind: str = "clock") -> float:
        return statistics.median(getattr(took, kind) for took in self.took[way]) if way in self.took else 0.0


def in_turns(found: Found, rounds: int, **ways: Callable[[], Took]) -> None:
    """Run each way once a round, forth and back."""
    for number in range(rounds):
        for way in list(ways) if number % 2 else reversed(ways):
            found.add(way, ways[way]())


def run_stage(setting: Setting, stage: Any) -> tuple[list[Commit], Took]:
    """Encode all shards as an actor does, two at a time where the stage allows it: the commits, and the time taken."""
    for name, spec in stage.columns.items():
        setting.corpus.declare_column(name, spec.stage, spec.scalars)
    setting.tries += 1
    commits: list[Commit] = []

    def work() -> None:
        tasks = [Task(ref, dict.fromkeys(stage.columns, setting.tries)) for ref in setting.refs]
        with ThreadPoolExecutor(getattr(stage, "at_once", 1)) as pool:
            for made in pool.map(partial(stage.run, setting.corpus), tasks):
                commits.extend(made)

    return commits, setting.time(work)


def warm(setting: Setting, stage: Any) -> None:
    for name, spec in stage.columns.items():
        setting.corpus.declare_column(name, spec.stage, spec.scalars)
    stage.load()
    stage.run(setting.corpus, Task(setting.refs[0], dict.fromkeys(stage.columns, 0), rows=range(4 * setting.batch)))


def best_batch(setting: Setting, work: Callable[[int], None], sizes: Sequence[int]) -> int:
    """Return the size with which `work`, which takes that many samples, is fastest by sample."""
    rates = {}
    for size in sizes:
        try:
            work(size)
            rates[size] = min(setting.time(partial(work, size)).clock for _ in range(2)) / size
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return min(rates, key=lambda size: rates[size])


# -- images ------------------------------------------------------------------------------------------------------------
def measure_feed(setting: Setting, name: str, rounds: int) -> Found:
    """Measure `feed` and `bare feed` alone, at the model's real sizes, which need no GPU."""
    where, sides = MODELS[name](setting.folder / name, setting.device), SIZES[name]
    columns = {f"latents/{name}-{side}": LatentsColumn(autoencoder=where, resolution=side) for side in sides}
    resources = Resources(latents_batch=setting.batch, decode_threads=setting.threads)
    feed, found = without_model(Latents(columns, 10**8, resources)), Found()
    run_stage(setting, feed)
    in_turns(
        found,
        rounds,
        feed=lambda: run_stage(setting, feed)[1],
        bare_feed=lambda: setting.time(partial(bare_feed, setting.corpus, sides, setting.threads)),
    )
    found.told |= {"resolutions": list(sides)}
    return found


def measure_images(setting: Setting, name: str, rounds: int) -> Found:
    from diffusers import AutoencoderKL

    from microdit.model.pretrained.autoencoder import AUTOENCODERS

    where, sides = MODELS[name](setting.folder / name, setting.device), SIZES[name]
    resources = Resources(latents_batch=setting.batch, decode_threads=setting.threads)
    options = {f"latents/{name}-{side}": LatentsColumn(autoencoder=where, resolution=side) for side in sides}
    modes = {f"{key}-mode": o.model_copy(update={"posterior": "mode"}) for key, o in options.items()}
    stage, checked, feed = (Latents(given, 10**8, resources) for given in (options, modes, dict(options)))
    images, found = setting.images, Found()
    warm(setting, stage)
    model = next(iter(stage.models.values()))
    half = model.fingerprint["dtype"] != "float32"
    folder = AUTOENCODERS[where].where if where in AUTOENCODERS else where
    network = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval().to(setting.device)
    plain = Plain(network, half)

    ready = {side: torch.rand(64, 3, side, side, device=setting.device) * 2 - 1 for side in sides}
    layout = {"dtype": model._dtype, "memory_format": torch.channels_last}
    ready = {side: pixels.to(**layout) for side, pixels in ready.items()}

    @torch.inference_mode()
    def encode(side: int, size: int) -> None:
        model._module.encode(ready[side][:size])

    sizes = (1, 2, 4, 8, 16, 32, 64) if setting.device == "cpu" else (8, 16, 32, 64)
    ceiling = {side: best_batch(setting, partial(encode, side), sizes) for side in sides}

    def bare() -> None:
        for side, size in ceiling.items():
            for _ in range(0, len(images), size):
                encode(side, size)

    common = partial(common_images, setting.folder / "common.tar", setting.device, plain, sides)
    best = best_common(setting, common)

    without_model(feed)
    commits, _ = run_stage(setting, checked)
    theirs = common(images, *best, False)
    ours: list[list[np.ndarray]] = [[] for _ in sides]
    for place, column in enumerate(checked.columns):
        ours[place] = list(arrays(setting.corpus, [c for c in commits if c.column == column]))
    found.told["difference"] = max(difference(a, b) for a, b in zip(ours, theirs, strict=True))
    assert found.told["difference"] < TOLERANCE, f"{name}: ours and the common loop's differ by {found.told}"

    in_turns(
        found,
        rounds,
        bare=lambda: setting.time(bare),
        stage=lambda: watch_stage(setting, stage, found),
        common=lambda: setting.time(partial(common, images, *best, True)),
        feed=lambda: run_stage(setting, feed)[1],
        bare_feed=lambda: setting.time(partial(bare_feed, setting.corpus, sides, setting.threads)),
    )
    found.told |= {"resolutions": list(sides), "bare_batch": ceiling, "common_batch_workers": list(best)}
    return found


def best_common(setting: Setting, common: Callable[..., Any]) -> tuple[int, int]:
    """Find the batch size and the number of workers with which the common loop is fastest on some of the images."""
    cores = len(os.sched_getaffinity(0))
    some = setting.images[: max(64, len(setting.images) // 4)]
    ways = [(b, w) for b in (8, 32) for w in sorted({0 if setting.device == "cpu" else cores // 2, cores})]
    common(some[:8], 8, 0, True)
    tried = {way: setting.time(partial(common, some, *way, True)).clock for way in ways}
    return min(tried, key=lambda way: tried[way])


def watch_stage(setting: Setting, stage: Any, found: Found) -> Took:
    """Run a stage, and note how busy the GPU was and how much of its memory was taken."""
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    commits, took = run_stage(setting, stage)
    assert all(commit.counts["failed"] == 0 for commit in commits), [commit.reasons for commit in commits]
    if setting.device == "cuda":
        found.told["gpu_busy"] = round(sum(commit.timings["encode_seconds"] for commit in commits) / took.clock, 3)
        found.told["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    return took


# -- text --------------------------------------------------------------------------------------------------------------
def measure_text(setting: Setting, name: str, rounds: int) -> Found:
    where = MODELS[name](setting.folder / name, setting.device)
    column = f"text/{name}@source"
    stage, texts, found = Text(column, TextColumn(encoder=where), setting.batch), setting.texts, Found()
    warm(setting, stage)
    encoder: Any = stage._model
    clip = encoder.fingerprint.get("tokens") == "open_clip"

    def tokens(some: Sequence[str]) -> dict[str, Tensor]:
        if clip:
            return {"input_ids": encoder._tokenizer(some).to(setting.device)}
        options = {"truncation": True, "max_length": encoder.max_tokens, "return_tensors": "pt"}
        return dict(encoder._tokenizer(list(some), padding=True, **options).to(setting.device))

    @torch.inference_mode()
    def encode(batch: dict[str, Tensor]) -> None:
        encoder._module(**batch)

    shortest_first = sorted(texts, key=len)
    middle = shortest_first[len(texts) // 2 :]
    sizes = sorted({min(size, len(middle)) for size in (8, 16, 32, 64, 128)})
    batches = {size: tokens(middle[:size]) for size in sizes}
    ceiling = best_batch(setting, lambda size: encode(batches[size]), sizes)
    ready = [tokens(shortest_first[i : i + ceiling]) for i in range(0, len(texts), ceiling)]

    def bare() -> None:
        for batch in ready:
            encode(batch)

    common = partial(common_text, setting.folder / "common.tar", setting.device, encoder)
    best = best_batch(setting, lambda size: void(common(texts[:size], size)), sizes)
    commits, _ = run_stage(setting, stage)
    ours, theirs = list(arrays(setting.corpus, commits)), common(texts, best)
    found.told["difference"] = difference(ours, [b[: len(a)] for a, b in zip(ours, theirs, strict=True)])
    assert found.told["difference"] < TOLERANCE, f"{name}: ours and the common loop's differ by {found.told}"
    in_turns(
        found,
        rounds,
        bare=lambda: setting.time(bare),
        stage=lambda: watch_stage(setting, stage, found),
        common=lambda: setting.time(partial(common, texts, best)),
    )
    found.told |= {"bare_batch": ceiling, "common_batch": best}
    return found


def void(_: object) -> None:
    """Discard the result of what is called for its time alone."""


# -- all ---------------------------------------------------------------------------------------------------------------
WAYS = ("bare", "stage", "common", "feed", "bare_feed")


def row_of(name: str, found: Found, samples: int) -> dict[str, Any]:
    what = "images" if name in SIZES else "captions"
    way = "stage" if "stage" in found.took else "feed"
    row: dict[str, Any] = {"model": name, f"{what}_per_second": round(samples / found.median(way), 2)}
    row |= {f"{way}_seconds": round(found.median(way), 3) for way in WAYS if way in found.took}
    row |= {f"{way}_cpu_seconds": round(found.median(way, "cpu"), 3) for way in WAYS if way in found.took}
    return row | ratios_of([found]) | {"gpu_busy": NOT_MEASURED, "peak_gpu_memory_mb": NOT_MEASURED} | found.told


def ratios_of(found: Sequence[Found]) -> dict[str, Any]:
    """Compute ratios of the seconds of all models together; the feed's, of those that have one."""
    ratios: dict[str, Any] = {}
    for kind, ending in (("clock", ""), ("cpu", "_cpu")):
        total = {way: sum(one.median(way, kind) for one in found) for way in WAYS}
        for name, ours, theirs in (
            ("ceiling", "stage", "bare"),
            ("common", "stage", "common"),
            ("feed", "feed", "bare_feed"),
        ):
            ratios[f"ratio_{name}{ending}"] = round(total[theirs] / total[ours], 4) if total[ours] else NOT_MEASURED
    return ratios


def measure(options: argparse.Namespace) -> dict[str, Any]:
    rows, found = [], []
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder, "corpus"), options.shards, options.samples, options.unique)
        setting = Setting(corpus, Path(folder), options.device, options.threads, options.batch)
        for name in options.models:
            ways = measure_text if name not in SIZES else measure_feed if options.feed_only else measure_images
            one = ways(setting, name, options.rounds)
            found.append(one)
            rows.append(row_of(name, one, options.shards * options.samples))
            if options.device == "cuda":
                torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    return {
        "device": options.device,
        "device_name": name,
        "cores": len(os.sched_getaffinity(0)),
        "samples": options.shards * options.samples,
        "batch": options.batch,
        "threads": options.threads,
        "rounds": options.rounds,
        **ratios_of(found),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "goals": GOALS,
        "models": rows,
        **{name: NOT_MEASURED for name in MODELS if name not in options.models},
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU, if there is one")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="by default real sizes on a GPU, else small")
    parser.add_argument("--feed-only", action="store_true", help="of autoencoders; for real sizes without a GPU")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, help="of a shard; by default 512 on a GPU, else 32")
    parser.add_argument("--unique", type=int, default=256, help="different images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="of our stages")
    parser.add_argument("--threads", type=int, help="that decode; by default 8 on a GPU, else 2")
    options = parser.parse_args()
    if options.device == "cpu":  # the stages take a GPU where they see one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.models = options.models or DEFAULT[options.device]
    options.samples = options.samples or (512 if options.device == "cuda" else 32)
    options.threads = options.threads or (8 if options.device == "cuda" else 2)
    found = measure(options)
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
