"""A small build of tars, to learn from, and the estimates of larger ones as JSON."""

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.estimate.estimate import estimate
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import Task, UnitTask
from tests.pipeline.helpers.dataset_archives import write_tar

INPUTS = 60  # of a tar
WORDS = ["red", "green", "small", "old", "round", "a", "the", "of", "with", "house", "tree", "boat", "river", "sky"]

COLUMNS: dict[str, Any] = {
    "captions/source": {},
    "scores/basic": {},
    "latents/demo-64": {"autoencoder": "demo", "resolution": 64},
    "text/minilm@source": {"encoder": "minilm"},
}


def write_tars(folder: Path, first: int, count: int) -> str:
    """Tars of pictures with captions; of each twelve samples one is broken."""
    for number in range(first, first + count):
        members: dict[str, bytes] = {}
        rng = random.Random(number)
        for i in range(INPUTS):
            members[f"{number}-{i}.jpg"] = b"broken" if i % 12 == 5 else picture(number * INPUTS + i)
            members[f"{number}-{i}.txt"] = " ".join(rng.choices(WORDS, k=3 + i % 10)).encode()
        write_tar(folder / f"{number:03d}.tar", members)
    return str(folder / "*.tar")


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((72, 64), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def config_of(folder: Path, files: str, shard_samples: int = 25, **more: Any) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "name": "tried",
            "corpus": str(folder / "corpus"),
            "shard_samples": shard_samples,
            "sources": {"own": {"adapter": "webdataset", "files": files}},
            "images": {"min_side": 32},
            "columns": COLUMNS,
            "resources": {"scratch": str(folder / "scratch")},
            **more,
        }
    )


def build(config: BuildConfig) -> Corpus:
    """All of it, in this process."""
    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    sources, stages = sources_of(config), stages_of(config)
    declare(corpus, config, sources, stages)
    for source in sources:
        with source.running(corpus, print):
            for unit in source.units():
                ingest_unit(corpus, source, UnitTask(unit), config)
    for stage in sorted(stages, key=lambda stage: stage.name.startswith("text")):
        for commit in corpus.commits(IMAGES):
            stage.run(corpus, Task(commit.ref, dict.fromkeys(stage.columns, 0)))
    return corpus


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("small")
    return build(config_of(folder, write_tars(folder / "tars", 0, 2)))


def planned(*given: Any, **more: Any) -> dict[str, Any]:
    """What `microdit plan --json` prints; takes what `estimate` takes."""
    return estimate(*given, **more).to_json()
