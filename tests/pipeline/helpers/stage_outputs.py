"""A small corpus of photos for the tests of stages, and what a stage made of it."""

import io
import pickle
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.arrays import array_from_bytes
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.rows import latest
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.sources.source import Input
from microdit.pipeline.stages.captions.given import GivenCaptions
from microdit.pipeline.stages.ingest import SCALARS, ingest_unit
from microdit.pipeline.stages.registry import stages_of
from microdit.pipeline.stages.stage import Stage, Task, UnitTask
from microdit.pipeline.tables.joins.build import build

SHARD = 8

CAPTIONS = [
    "a red apple",
    "",
    "two  words",
    "a much longer caption with a good many words in it",
    "five",
    "x",
    "y",
    "z",
]


def photo(seed: int, size: tuple[int, int] = (72, 64)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


class Photos:
    """Twelve photos, the third one of them missing and the fifth one broken."""

    name = "photos"
    terms = "made for a test"

    def read(self, unit: str, wanted) -> Generator[Input]:
        for i in range(12):
            data: bytes | None = saved(photo(i, (72 + i, 64 + 3 * i)))
            if i == 4:
                data = b"broken"
            reason = "http_404" if i == 2 else None
            caption = CAPTIONS[i % len(CAPTIONS)]
            fields = {0: {}, 1: {"long": f"a long one of {i}"}, 2: {"long": i}}[i % 3]
            yield Input(i, f"k{i}", None if reason else data, f"http://x/{i}.jpg", caption, "", fields, reason)

    def stage(self) -> dict:
        return {"adapter": "photos"}

    def units(self) -> list[str]:
        return ["photos-000000"]

    def running(self, corpus, say):
        return nullcontext()


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    """A random autoencoder of the real class, f8 with 4 channels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return str(folder)


def config(root: Path, columns: dict, **more) -> BuildConfig:
    return BuildConfig.model_validate(
        {
            "name": "tried",
            "corpus": str(root),
            "shard_samples": SHARD,
            "sources": {"photos": {"adapter": "urls", "list": "not read"}},
            "images": {"min_side": 32, "format": "png"},
            "columns": columns,
            **more,
        }
    )


def start(root: Path) -> Corpus:
    corpus = Corpus.create(root, "tried", SHARD)
    corpus.declare_column("images", {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_source("photos", {"adapter": "photos"})
    ingest_unit(corpus, Photos(), UnitTask("photos-000000"), config(root, {}))
    return corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return start(tmp_path / "corpus")


def make(corpus: Corpus, columns: dict, **more) -> dict[str, list[Commit]]:
    """Declare and run the columns' stages in the order of the config; the commits by column."""
    made: dict[str, list[Commit]] = {}
    for stage in stages_of(config(Path(corpus.url), columns, **more)):
        for column, spec in stage.columns.items():
            corpus.declare_column(column, spec.stage, spec.scalars)
        if isinstance(stage, GivenCaptions) and stage.table is not None:
            build(corpus, stage.table, Path(corpus.url) / "scratch", print)
        worker: Stage = pickle.loads(pickle.dumps(stage))  # as it comes to a worker
        worker.load()
        for images in corpus.commits("images"):
            for commit in worker.run(corpus, Task(images.ref, dict.fromkeys(stage.columns, 0))):
                made.setdefault(commit.column, []).append(commit)
    return made


def lines(corpus: Corpus, commits: list[Commit]) -> list[dict]:
    return [line for commit in commits for line in corpus.sidecar(commit).to_pylist()]


def arrays(corpus: Corpus, commits: list[Commit]) -> dict[str, np.ndarray]:
    found = {}
    for commit in commits:
        with corpus.open_object(commit) as file:
            found |= {key: array_from_bytes(members["npy"]) for key, members in read_tar(file)}
    return found


def check_rows(corpus: Corpus, commits: list[Commit], inputs: str) -> None:
    """Every row is there, those that failed in the input with `upstream`, and the lineage is the input's."""
    assert [c.shard for c in commits] == ["photos-000000-00", "photos-000000-01"]
    before = lines(corpus, [latest(corpus, inputs, c.ref) for c in commits])
    after = lines(corpus, commits)
    assert [(line["row"], line["key"]) for line in after] == [(line["row"], line["key"]) for line in before]
    for old, new in zip(before, after, strict=True):
        assert (new["reason"] == "upstream") is (old["status"] == "failed")
        if old["status"] == "failed":
            assert inputs in new["detail"] and old["reason"] in new["detail"]
    for commit in commits:
        assert commit.inputs == [latest(corpus, inputs, commit.ref).as_input()]
        assert commit.fingerprint == corpus.column(commit.column).fingerprint
        assert commit.counts["in"] == commit.counts["out"] + commit.counts["failed"]
