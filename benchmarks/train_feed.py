"""The trainer's loader in front of the trainer's step: the share of its time that the step waits for data.

    python -m benchmarks.train_feed [--device cuda] [--preset xl_2] [--pixels 256] [--samples 8192] [--json]

A made-up corpus in a folder: latents of the size and text of 8 to 48 tokens, 1,024 wide, in float16. The step is
`Learner.step` on batches of `LegData.batches_ahead`, as in training: verified, shuffled, ragged. The first quarter of
the steps warms up. `data_wait` is the waited share of the others' time; goal: at most 0.02. `alone`: images a second of
the step with batches that are ready on the device, and of the loader with no step behind it.
"""

import argparse
import sys
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import argument_parser, print_figures
from benchmarks.train_step import SIZES
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.trainer.data.batches import LegData
from microdit.trainer.data.samples import open_cache, open_samples
from microdit.trainer.learner import Learner, compile_blocks
from microdit.trainer.processes import Team
from microdit.trainer.recipe import Recipe

GOAL = 0.02
SHARD, WIDTH = 256, 1024
LATENTS, TEXT = "latents/sdxl", "text/t5@source"


def write(root: Path, samples: int, side: int) -> None:
    """Write a corpus of made-up latents (4, side, side) and texts."""
    corpus = Corpus.create(root, "feed", SHARD)
    corpus.declare_source("made", {"adapter": "made-up"})
    for column in ("images", LATENTS, "captions/source", TEXT):
        corpus.declare_column(column, {"stage": column.split("/")[0]})
    rng = np.random.default_rng(0)
    noise = rng.normal(size=1 << 22).astype(np.float16)

    def some(*shape: int) -> bytes:
        start = int(rng.integers(0, len(noise) - np.prod(shape)))
        return array_bytes(noise[start : start + int(np.prod(shape))].reshape(shape))

    for number in range(-(-samples // SHARD)):
        unit = unit_name("made", number)
        ref = ShardRef(source="made", unit=unit, shard=shard_name(unit, 0))
        inputs: list[Commit] = []
        for column in ("images", "captions/source", LATENTS, TEXT):
            with begin_attempt(corpus, column, ref, inputs[-1:] if column == TEXT else inputs[:1]) as attempt:
                for row in range(min(SHARD, samples - number * SHARD)):
                    members = {
                        "images": {"png": b"-", "json": b"{}"},
                        "captions/source": {},
                        LATENTS: {"npy": some(4, side, side) if column == LATENTS else b""},
                        TEXT: {"npy": some(int(rng.integers(8, 49)), WIDTH) if column == TEXT else b""},
                    }[column]
                    attempt.add(row, f"{number}-{row}", members)
                made = attempt.commit()
            if column in ("images", "captions/source"):
                inputs.append(made)


def make_recipe(folder: Path, options: argparse.Namespace) -> Recipe:
    """Describe the training: one leg on the corpus in `folder`."""
    leg = {"latents": LATENTS, "steps": 10**6, "batch": options.batch, "mask_ratio": 0.75, "learning_rate": 1e-5}
    leg |= {"micro_batch": options.micro_batch} if options.micro_batch else {}
    return Recipe.model_validate(
        {
            "name": "feed", "corpus": str(folder / "corpus"), "out": str(folder / "out"),
            "text": {TEXT: 1.0}, "text_lengths": [16, 24, 32, 48], "lanes": 4, "hold_out": 0, "stages": [leg],
            "cache_mb": 8192,
        }
    )  # fmt: skip


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time the loader alone, the step alone, and both together."""
    device, side, batch = options.device, options.pixels // 8, options.batch
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "corpus"), options.samples, side)
        recipe = make_recipe(Path(folder), options)
        config = SIZES[options.preset] | {"input_size": side, "caption_channels": WIDTH}
        learner = Learner(recipe, config, Team(0, 1, torch.device(device)))
        if device == "cuda":
            compile_blocks(learner.net)
        samples = open_samples(recipe)
        (index,) = samples.legs
        stage, warm = recipe.stages[0], max(1, options.steps // 4)
        with closing(open_cache(recipe, samples)) as cache:
            data = LegData(recipe, stage, index, cache, 2)

            def loaded(steps: int) -> float:
                began = time.perf_counter()
                for _ in data.batches(0, 0, steps):
                    pass
                return time.perf_counter() - began

            loaded(warm)
            loader = loaded(options.steps)
            waited = worked = 0.0
            with closing(data.batches_ahead(0, 0, warm + options.steps)) as batches:
                for number in range(warm + options.steps):
                    if number == warm:
                        synchronize(device)
                        waited, worked = 0.0, time.perf_counter()
                    began = time.perf_counter()
                    one = next(batches)
                    waited += time.perf_counter() - began
                    learner.step(one, stage, 1e-5)
                synchronize(device)
                together = time.perf_counter() - worked
            ready = list(islice(data.batches(0, 0, 4), 4))
            synchronize(device)
            began = time.perf_counter()
            for number in range(options.steps):
                learner.step(ready[number % len(ready)], stage, 1e-5)
            synchronize(device)
            alone = time.perf_counter() - began
    images = batch * options.steps
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "preset": options.preset,
        "pixels": options.pixels,
        "batch": batch,
        "steps": options.steps,
        "images_per_second": round(images / together, 2),
        "alone": {"step": round(images / alone, 2), "loader": round(images / loader, 2)},
        "data_wait": round(waited / together, 4),
        "goal": GOAL,
        "met": waited / together <= GOAL,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", choices=tuple(SIZES), help="default: xl_2 on a GPU, tiny_2 on a CPU")
    parser.add_argument("--pixels", type=int, help="default: 256 on a GPU, 64 on a CPU")
    parser.add_argument("--samples", type=int, help="default: 16384 on a GPU, 256 on a CPU")
    parser.add_argument("--batch", type=int, help="of a step; default: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--micro-batch", type=int, help="default: the trainer's own choice, the batch")
    parser.add_argument("--steps", type=int, help="that are timed; default: 40 on a GPU, 4 on a CPU")
    options = parser.parse_args(arguments)
    for name, (gpu, cpu) in {
        "preset": ("xl_2", "tiny_2"), "pixels": (256, 64), "samples": (16384, 256), "batch": (256, 8), "steps": (40, 4),
    }.items():  # fmt: skip
        if getattr(options, name) is None:
            setattr(options, name, gpu if options.device == "cuda" else cpu)
    print_figures(measure(options), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
