"""A whole corpus made in one process without Ray: real ingest, real stages, the real plan. As a program it builds one.

`python -m tests.pipeline.helpers.whole_build URL`; where MICRODIT_FAIL_POINT says so, it is killed there.
"""

import io
import os
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from microdit.pipeline.base.fail_points import fail_point
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, unit_name
from microdit.pipeline.engine.plan import Plan
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.ingest import SCALARS, ingest_stage, ingest_unit
from microdit.pipeline.stages.registry import stages_of
from microdit.pipeline.stages.stage import Stage
from microdit.pipeline.tables.sample_table import sample_table

UNITS, INPUTS, SHARD = 2, 10, 4
SHARDS = UNITS * -(-INPUTS // SHARD)
COLUMNS = (IMAGES, "captions/source", "scores/basic")


class Pictures:
    """Units of ten inputs, of which one is missing and one is broken."""

    name = "pictures"
    terms = "made for a test"

    def stage(self) -> dict[str, Any]:
        return {"adapter": "pictures"}

    def units(self) -> list[str]:
        return [unit_name(self.name, number) for number in range(UNITS)]

    def running(self, corpus: Corpus, say: Callable[[str], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        number = int(unit[-1])
        for i in range(INPUTS):
            data = picture(number * INPUTS + i) if wanted(i) and i != 3 else None
            reason = "http_404" if i == 3 else None
            yield Input(i, f"k{number}-{i}", b"broken" if i == 7 else data, "", f"picture {i}", "", reason=reason)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def config_of(url: str | Path) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "name": "whole",
            "corpus": str(url),
            "shard_samples": SHARD,
            "sources": {"pictures": {"adapter": "urls", "list": "not read"}},
            "images": {"min_side": 32, "format": "png"},
            "columns": {"captions/source": {}, "scores/basic": {}},
        }
    )


def open_whole(url: str | Path) -> tuple[Corpus, list[Stage]]:
    config = config_of(url)
    corpus, stages = Corpus.create(url, "whole", SHARD), stages_of(config)
    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_source("pictures", {**Pictures().stage(), "images": ingest_stage(config.images)})
    for stage in stages:
        for column, spec in stage.columns.items():
            corpus.declare_column(column, spec.stage, spec.scalars)
    return corpus, stages


def build_whole(url: str | Path, redo: dict[str, set[tuple[str, str]]] | None = None) -> int:
    """Make what is not there; how many shards of how many columns were made."""
    corpus, stages = open_whole(url)
    plan = Plan(corpus, {"pictures": Pictures().units()}, stages, redo=redo)
    before = sum(plan.done.values())
    from microdit.pipeline.engine.retries import Retries

    retries = Retries(1, SHARD)
    while plan.units:
        record = ingest_unit(corpus, Pictures(), retries.unit_task(plan.units.popleft()), config_of(url))
        for shard in record.shards:
            plan.committed("pictures", shard, IMAGES)
    for number in reversed(plan.downstream_first()):
        while job := plan.take(number):
            for commit in stages[number].run(corpus, retries.task(job)):
                plan.committed(commit.source, commit.shard, commit.column)
            plan.release(job)
    sample_table(corpus)
    return sum(plan.done.values()) - before


def link(written: Path, final: Path) -> None:
    """`os.link` with fail points: a file that is written and not yet in its place."""
    folder = final.relative_to(sys.argv[1]).parts[0]
    if folder in ("commits", "tables"):
        fail_point({"commits": "linking", "tables": "publishing-table"}[folder])
    _link(written, final)


if __name__ == "__main__":
    _link = os.link
    os.link = link  # type: ignore[assignment]
    build_whole(sys.argv[1])
