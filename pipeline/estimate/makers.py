"""Times of the models that make pictures of prompts: from a past build, or from published figures (`makers.json`).

An entry of `makers.json` is one published figure: `seconds` of one picture of `size` x `size` pixels in `steps` steps
on one GPU of the kind `device`, and where it comes from. For other sizes, steps and GPUs the time is taken to be in
proportion to the pixels, the steps and the peak of the GPU.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pydantic import TypeAdapter

from microdit.pipeline.config.block import Options
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.synthesis import MakerOptions, SynthesizeSource
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.estimate import rates
from microdit.pipeline.estimate.past_build import PastBuild
from microdit.pipeline.estimate.source_sizes import SourceSize
from microdit.pipeline.sources.synthesis.licences import known_model

LONG = 10  # times the usual interval between two shards: the build stood still
ATTEMPT_TIME = "%Y%m%dT%H%M%S"


class PublishedSpeed(Options):
    """An entry of the table."""

    model: str
    device: str
    size: int
    steps: int
    seconds: float
    source: str


class Drawing(NamedTuple):
    """Seconds of a worker that one picture takes, None if nobody knows; and the figure's origin."""

    seconds: float | None
    origin: str


@dataclass(frozen=True)
class MakerWork:
    """A maker of a source, and how many pictures it makes."""

    source: str
    options: MakerOptions
    images: int

    @property
    def name(self) -> str:
        """Of the stage that draws them."""
        return f"{self.source}:{self.options.label}"


@cache
def published() -> tuple[PublishedSpeed, ...]:
    """Read the table of published figures."""
    entries = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return tuple(TypeAdapter(list[PublishedSpeed]).validate_python(entries))


def makers_of(config: BuildConfig, sizes: Mapping[str, SourceSize]) -> Iterator[MakerWork]:
    """List the makers of all sources, with their shares of the pictures."""
    for name, options in config.sources.items():
        if isinstance(options, SynthesizeSource):
            weights, left = sum(maker.weight for maker in options.makers), sizes[name].inputs
            for maker in options.makers:
                images = min(left, round(sizes[name].inputs * maker.weight / weights))
                images = left if maker is options.makers[-1] else images
                left -= images
                yield MakerWork(name, maker, images)


def drawing(work: MakerWork, gpu: str | None, past: PastBuild | None, assume: Callable[[str], None]) -> Drawing:
    """Tell how long a picture takes.

    Args:
        gpu: a kind of `rates.GPUS`; None draws on the CPU.
        assume: receives lines for people.
    """
    learned = None if past is None else _learned(work, gpu, past)
    if learned is not None:
        return learned
    entries = [entry for entry in published() if entry.model.lower() == work.options.model.lower()]
    if gpu is None or not entries:
        return Drawing(None, f"not measured: {work.options.model} on {gpu or rates.CPU}")
    pixels = math.prod(work.options.sides or (0, 0))
    entry = min(entries, key=lambda e: abs(math.log(max(pixels, 1) / e.size**2)) if pixels else -e.size)
    if not pixels:
        assume(f"{work.name}: pictures of {entry.size} x {entry.size} pixels; say `size` for others")
    known = known_model(work.options.model)
    steps = work.options.steps or (known.steps if known is not None else None) or entry.steps
    factors = {
        f"{steps} steps for {entry.steps}": steps / entry.steps,
        f"{pixels:,} pixels for {entry.size**2:,}": (pixels or entry.size**2) / entry.size**2,
        f"{gpu} for {entry.device}": rates.GPUS[entry.device].tflops / rates.GPUS[gpu].tflops,
    }
    scaled = [name for name, factor in factors.items() if factor != 1]
    origin = f"{entry.source}, not measured here: {entry.seconds:g} s for {entry.size} x {entry.size} pixels"
    origin += f"; in proportion for {', '.join(scaled)}" if scaled else ""
    return Drawing(entry.seconds * math.prod(factors.values()), origin)


def _learned(work: MakerWork, gpu: str | None, past: PastBuild) -> Drawing | None:
    """Learn from the shards of the past build that this maker drew on such a device, with these steps and this size."""
    commits = []
    for commit in past.commits(IMAGES, work.source) if work.source in past.sources else ():
        fits = commit.device == rates.CPU if gpu is None else rates.is_kind(commit.device, gpu)
        if fits and commit.counts["in"] and _is_of(work.options, _fields(past, commit)):
            commits.append(commit)
    if not commits:
        return None
    seconds = _seconds(commits) if gpu is not None else None
    if seconds is None:  # with the time until a unit's first picture
        spent = sum(c.timings.get("seconds", 0.0) + c.timings.get("wait_seconds", 0.0) for c in commits)
        seconds = spent / sum(commit.counts["in"] for commit in commits)
    return Drawing(seconds, f"earlier build, {len(commits):,} shards")


def _seconds(commits: list[Commit]) -> float | None:
    """Return the seconds of a picture by when the shards of a GPU began, one after the other; None for too few."""
    by_gpu: dict[tuple[str, str], list[Commit]] = defaultdict(list)
    for commit in commits:
        by_gpu[commit.host, commit.gpu].append(commit)
    steps: list[tuple[float, int]] = []
    for some in by_gpu.values():
        some.sort(key=lambda commit: commit.attempt)
        began = [datetime.strptime(commit.attempt.partition("-")[0], ATTEMPT_TIME) for commit in some]
        for first, after, commit in zip(began, began[1:], some, strict=False):
            steps.append(((after - first).total_seconds(), commit.counts["in"]))
    usual = median(seconds / count for seconds, count in steps) if len(steps) > 1 else 0.0
    steps = [(seconds, count) for seconds, count in steps if seconds / count <= LONG * usual]
    return sum(seconds for seconds, _ in steps) / sum(count for _, count in steps) if steps and usual else None


def _fields(past: PastBuild, commit: Commit) -> dict[str, object]:
    """Return the fields of the first picture of a shard; all are of the same maker."""
    first = next((text for text in past.corpus.sidecar(commit)["fields"].to_pylist() if text), "{}")
    found: dict[str, object] = json.loads(first)
    return found


def _is_of(options: MakerOptions, fields: Mapping[str, object]) -> bool:
    """Tell whether pictures with these fields are of a maker, as far as its options say."""
    sides = "" if options.sides is None else "{}x{}".format(*options.sides)
    asked = {"maker": options.label, "steps": options.steps, "size": sides or None}
    return all(value is None or fields.get(name) == value for name, value in asked.items())
