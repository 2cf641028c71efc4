"""Corpora of real pictures with their `scores/basic`, for the table jobs; and the command line."""

import hashlib
import io
from pathlib import Path

import numpy as np
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from microdit.pipeline.cli.app import app
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.stages.scores.pixels import basic_score_stage
from microdit.pipeline.stages.scores.turned import turned_score_stage
from microdit.pipeline.stages.stage import Task
from tests.pipeline.helpers.small_corpus import IMAGE_SCALARS, SOURCE

UNIT = unit_name(SOURCE, 0)


def photo(seed: int, side: int = 96) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def write(corpus: Corpus, number: int, images: list[Image.Image | None]) -> None:
    """A shard of pictures, and their scores by the stage itself."""
    ref = ShardRef(source=SOURCE, unit=UNIT, shard=shard_name(UNIT, number))
    with begin_attempt(corpus, "images", ref) as attempt:
        for row, image in enumerate(images):
            key = f"{ref.shard}-{row}"
            if image is None:
                attempt.fail(row, key, "http_404", "the server said 404")
                continue
            buffer = io.BytesIO()
            image.save(buffer, "png")
            data, sizes = buffer.getvalue(), dict(zip(("width", "height"), image.size, strict=True))
            about = dict.fromkeys(("caption", "origin", "license", "fields"), "") | sizes
            about |= {f"original_{name}": size for name, size in sizes.items()}
            about |= {"sha256": hashlib.sha256(data).hexdigest()}
            attempt.add(row, key, {"png": data, "json": b"{}"}, **about, format="png", bytes=len(data))
        attempt.commit()
    stage = basic_score_stage("scores/basic", 1 << 24)
    stage.run(corpus, Task(ref, {"scores/basic": 0}))


def add_turned(corpus: Corpus) -> Corpus:
    """The column `scores/turned` of all shards that are there."""
    stage = turned_score_stage("scores/turned", 1 << 24)
    spec = stage.columns["scores/turned"]
    corpus.declare_column("scores/turned", spec.stage, spec.scalars)
    for commit in corpus.commits("images"):
        stage.run(corpus, Task(commit.ref, {"scores/turned": 0}))
    return corpus


def corpus_of(url: Path, images: list[Image.Image | None]) -> Corpus:
    corpus = Corpus.create(url, "doubles", shard_samples=8)
    corpus.declare_source(SOURCE, {"adapter": "made"})
    corpus.declare_column("images", {"stage": "images"}, IMAGE_SCALARS)
    spec = basic_score_stage("scores/basic", 1 << 24).columns["scores/basic"]
    corpus.declare_column("scores/basic", spec.stage, spec.scalars)
    write(corpus, 0, images)
    return corpus


def microdit(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
