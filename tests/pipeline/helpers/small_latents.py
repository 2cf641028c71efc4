"""Random autoencoders and one shard of images, for tests of latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.encoders import LatentsColumn
from microdit.pipeline.content import crop
from microdit.pipeline.content.images import decode
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.corpus.rows import Row, read_rows
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.stages.latents import Latents
from microdit.pipeline.stages.stage import Task
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS, write_images

REF = ShardRef(source="demo", unit="demo-000000", shard="demo-000000-00")
ROWS = 30  # sides of 64 to 93 pixels
FAILED = (2, 11)
KEYS = [f"{REF.shard}-{row}" for row in range(ROWS)]


def kl(folder: Path, seed: int, spread: float = 20.0, gain: float = 1.0) -> str:
    """A random autoencoder of the real class, f8 with 4 channels, whose posterior has a width that matters."""
    torch.manual_seed(seed)
    module = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        module.encoder.conv_out.weight.mul_(spread)
        module.quant_conv.weight[:4].mul_(gain)
        module.quant_conv.bias[:4].mul_(gain)
    module.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kl(tmp_path_factory.mktemp("models") / "one", 0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kl(tmp_path_factory.mktemp("models") / "two", 1)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return start(tmp_path / "corpus")


def start(root: Path) -> Corpus:
    corpus = Corpus.create(root, "latents", ROWS)
    corpus.declare_source("demo", {"adapter": "made"})
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, IMAGE_SCALARS)
    write_images(corpus, REF, FAILED, rows=ROWS)
    return corpus


def columns(**given: tuple[str, int] | tuple[str, int, str]) -> dict[str, LatentsColumn]:
    """`a=(autoencoder, resolution[, posterior])` is the column `latents/a`."""
    names = ("autoencoder", "resolution", "posterior")
    return {
        f"latents/{name}": LatentsColumn(**dict(zip(names, values, strict=False)))  # type: ignore[arg-type]
        for name, values in given.items()
    }


def stage_of(corpus: Corpus, asked: dict[str, LatentsColumn], **resources: Any) -> Latents:
    stage = Latents(asked, 10**8, Resources(**{"latents_batch": 4} | resources))
    for name, spec in stage.columns.items():
        corpus.declare_column(name, spec.stage, spec.scalars)
    stage.load()
    return stage


def run(stage: Latents, corpus: Corpus, wanted: Sequence[str] | None = None, **more: Any) -> dict[str, Commit]:
    task = Task(REF, dict.fromkeys(stage.columns if wanted is None else wanted, 0), **more)
    return {commit.column: commit for commit in stage.run(corpus, task)}


def arrays(corpus: Corpus, commit: Commit) -> dict[str, np.ndarray]:
    with corpus.open_object(commit) as file:
        return {key: array_from_bytes(members["npy"]) for key, members in read_tar(file)}


def reasons(corpus: Corpus, commit: Commit) -> dict[str, str | None]:
    return {line["key"]: line["reason"] for line in corpus.sidecar(commit).to_pylist()}


def rows_of(corpus: Corpus) -> dict[str, Row]:
    [images] = corpus.commits("images")
    return {row.key: row for row in read_rows(corpus, images) if row.ok}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """What every decode was asked to shrink to."""
    calls: list[int | None] = []

    def counting(data: bytes, max_pixels: int, shrink_to: int | None = None) -> Any:
        calls.append(shrink_to)
        return decode(data, max_pixels, shrink_to)

    monkeypatch.setattr(crop, "decode", counting)
    return calls
