"""A corpus in the real format with made-up latents and texts: what the trainer sees, without images and encoders."""

import io
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.model.pretrained.text import load_text_encoder
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.trainer.learner import Learner
from microdit.trainer.recipe import Recipe
from tests.servers.hub import hub

__all__ = ["hub"]

CAPTIONS = ("source", "long")


def write_shard(corpus: Corpus, column: str, ref: ShardRef, inputs: list, generation: int = 0, failed=(), size=None):
    """One shard of a column: rows of `failed` are failed. Latents and texts hold numbers that tell shard and row."""
    size = size or corpus.shard_samples
    number = int(ref.shard[-2:]) + 10 * int(ref.unit[-6:])
    with begin_attempt(corpus, column, ref, inputs, generation) as attempt:
        for row in range(size):
            key = f"k{number}-{row}"
            rng = np.random.default_rng([number, row, len(column)])
            if row in failed:
                attempt.fail(row, key, "not_an_image")
            elif column == "images":
                attempt.add(row, key, {"png": b"no image", "json": b"{}"})
            elif column.startswith("captions/"):
                attempt.add(row, key, caption=f"drawing {number} {row}", tokens=3)
            elif column.startswith("latents/"):
                side = int(column.rpartition("-")[2]) // 8
                latent = np.full((4, side, side), 0.8) + 0.2 * rng.normal(size=(4, side, side))  # something to learn
                latent = latent.astype(np.float16)
                latent[0, 0, 0] = (number * 16 + row) / 256
                attempt.add(row, key, {"npy": array_bytes(latent)})
            else:
                tokens = 2 + (number + row) % (5 if column.endswith("source") else 20)
                attempt.add(
                    row, key, {"npy": array_bytes(rng.normal(size=(tokens, 16)).astype(np.float16))}, tokens=tokens
                )
        return attempt.commit()


def build_corpus(
    root: Path, units: int = 2, shards: int = 3, shard_samples: int = 16, failed: dict | None = None
) -> Corpus:
    """`failed` maps a column to rows that fail in each of its shards."""
    failed = failed or {}
    corpus = Corpus.create(root, "test", shard_samples)
    corpus.declare_source("art", {"adapter": "made-up"})
    corpus.declare_column("images", {"stage": "images"})
    for captions in CAPTIONS:
        corpus.declare_column(f"captions/{captions}", {"stage": "captions"}, {"caption": "string", "tokens": "int32"})
        corpus.declare_column(f"text/tiny@{captions}", {"stage": "text", "encoder": "tiny"}, {"tokens": "int32"})
    for side in (32, 64):
        corpus.declare_column(f"latents/demo-{side}", {"stage": "latents", "autoencoder": "demo", "resolution": side})
    for u in range(units):
        unit = unit_name("art", u)
        names = [shard_name(unit, s) for s in range(shards)]
        for name in names:
            ref = ShardRef(source="art", unit=unit, shard=name)
            images = write_shard(corpus, "images", ref, [], failed=failed.get("images", ()))
            for side in (32, 64):
                column = f"latents/demo-{side}"
                write_shard(corpus, column, ref, [images], failed=failed.get(column, ()))
            for captions in CAPTIONS:
                made = write_shard(corpus, f"captions/{captions}", ref, [images])
                write_shard(
                    corpus, f"text/tiny@{captions}", ref, [made], failed=failed.get(f"text/tiny@{captions}", ())
                )
        commit_unit(corpus, "art", unit, shards * shard_samples, names)
    return corpus


MODEL = {
    "dim": 32, "depth": 2, "head_dim": 16, "multiple_of": 8, "patch_mixer_depth": 1, "patch_mixer_dim": 32,
    "num_experts": 2,
}  # fmt: skip

STAGE = {"latents": "latents/demo-32", "batch": 16, "learning_rate": 1e-3, "ema_half_life": 200}


def build_recipe(of: Corpus, out: Path | str, **fields) -> Recipe:
    """A recipe of seconds: two stages on the made-up corpus."""
    base = {
        "name": "test", "corpus": of.url, "out": str(out), "seed": 3, "model": MODEL, "lanes": 8,
        "shuffle_window": 2,
        "text": {"text/tiny@source": 0.7, "text/tiny@long": 0.3}, "text_lengths": [4, 8, 16, 32], "precision": "fp32",
        "stages": [
            STAGE | {"steps": 5, "mask_ratio": 0.5, "warmup": 32},
            STAGE | {"steps": 7, "schedule": "cosine", "final_learning_rate": 1e-5},
        ],
        "log_every": 1, "checkpoint_every": 4,
    }  # fmt: skip
    return Recipe.model_validate(base | fields)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """96 rows in 6 shards; rows 3 and 7 of each shard are bad in one column or another: 84 are good."""
    return build_corpus(
        tmp_path_factory.mktemp("corpus"),
        failed={"latents/demo-32": (3,), "latents/demo-64": (3,), "text/tiny@long": (7,)},
    )


@pytest.fixture
def recipe(corpus: Corpus, tmp_path: Path) -> Callable[..., Recipe]:
    return lambda **fields: build_recipe(**{"of": corpus, "out": tmp_path / "run"} | fields)


def validations(out: Path) -> dict[int, dict]:
    """By step, what the log of a run says; without the seconds."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    found = {line["step"]: dict(line["validation"]) for line in lines if "validation" in line}
    for figures in found.values():
        assert figures.pop("seconds") >= 0
    return found


def losses(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def state(out: Path, step: int) -> dict:
    return json.loads((out / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def tensors(out: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def saved_steps(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").iterdir())


@pytest.fixture
def yaml_recipe(recipe, tmp_path):
    def write(**fields) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(**fields).model_dump(mode="json", exclude_none=True)))
        return path

    return write


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch):
    """Do something before the n-th step of this process is taken."""
    original = Learner.step

    def plan(number: int, action) -> None:
        count = 0

        def step(self, *args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                action()
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Learner, "step", step)

    return plan


# -- with pictures ----------------------------------------------------------------------------------------------------
NAMES = ("red", "green", "blue", "yellow", "pink", "black")
COLOURS = ((220, 30, 30), (30, 180, 30), (30, 30, 220), (230, 220, 30), (240, 150, 200), (10, 10, 10))


def picture(number: int) -> tuple[str, np.ndarray]:
    """36 different pictures: one colour above, one below, on white."""
    above, below = divmod(number, 6)
    pixels = np.full((48, 32, 3), 255, np.uint8)
    pixels[12:24, 4:28], pixels[24:36, 4:28] = COLOURS[above], COLOURS[below]
    return f"{NAMES[above]} above {NAMES[below]}", pixels


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The 36 pictures with captions, real latents of 32 px and real text."""
    corpus = Corpus.create(tmp_path_factory.mktemp("coloured"), "coloured", 12)
    corpus.declare_source("art", {"adapter": "made-up"})
    corpus.declare_column("images", {"stage": "images"})
    corpus.declare_column("captions/source", {"stage": "captions"}, {"caption": "string", "tokens": "int32"})
    autoencoder, encoder = load_autoencoder("demo"), load_text_encoder("minilm")
    corpus.declare_column(
        "latents/demo-32",
        {"autoencoder": "demo", "revision": None, "resolution": 32, "model": autoencoder.fingerprint},
    )
    corpus.declare_column("text/minilm@source", {"encoder": "minilm", "revision": None, "model": encoder.fingerprint})
    for shard in range(3):
        ref = ShardRef(source="art", unit="art-000000", shard=f"art-000000-{shard:02d}")
        rows = [(row, f"k{12 * shard + row}", *picture(12 * shard + row)) for row in range(12)]
        with begin_attempt(corpus, "images", ref) as attempt:
            for row, key, _, pixels in rows:
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                attempt.add(row, key, {"png": buffer.getvalue(), "json": b"{}"})
            images = attempt.commit()
        with begin_attempt(corpus, "captions/source", ref, [images]) as attempt:
            for row, key, caption, _ in rows:
                attempt.add(row, key, caption=caption, tokens=3)
            captions = attempt.commit()
        latents = autoencoder.encode(np.stack([pixels[8:40] for *_, pixels in rows]), posterior="mode").numpy()
        with begin_attempt(corpus, "latents/demo-32", ref, [images]) as attempt:
            for row, key, *_ in rows:
                attempt.add(row, key, {"npy": array_bytes(latents[row].astype(np.float16))})
            attempt.commit()
        text, lengths = encoder.encode([caption for _, _, caption, _ in rows])
        with begin_attempt(corpus, "text/minilm@source", ref, [captions]) as attempt:
            for row, key, *_ in rows:
                attempt.add(row, key, {"npy": array_bytes(text[row, : lengths[row]].numpy().astype(np.float16))})
            attempt.commit()
    return corpus


def short_recipe(corpus: Corpus, out: Path, **fields) -> Recipe:
    stage = {"latents": "latents/demo-32", "batch": 32, "learning_rate": 3e-3, "ema_half_life": 200, "warmup": 100}
    stage["p_mean"] = 0.6
    base = {"text": {"text/minilm@source": 1.0}, "hold_out": 6, "guidance_scale": 1.0, "log_every": 50}
    base["stages"] = [stage | {"steps": 400, "schedule": "cosine"}]
    return build_recipe(corpus, out, **(base | fields))


# -- several processes -----------------------------------------------------------------------------------------------
def _member(rank: int, environment: dict, recipe: dict, at: tuple[int, int, int] | None, backend: str) -> None:
    """One process of a team. at: (rank, step, signal) that it sends itself before it takes that step."""
    os.environ.update(environment, RANK=str(rank))
    from microdit.trainer import learner
    from microdit.trainer import processes as team_module
    from microdit.trainer.train import train

    torch.set_num_threads(1)
    team_module.SECONDS = 0.0  # they ask each other after every step
    compile_blocks, step, count = learner.compile_blocks, learner.Learner.step, 0

    def compiled(net) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
            compile_blocks(net)

    def noticed(self, *args, **kwargs):
        nonlocal count
        count += 1
        if at is not None and at[:2] == (rank, count):
            os.kill(os.getpid(), at[2])
        return step(self, *args, **kwargs)

    learner.compile_blocks, learner.Learner.step = compiled, noticed
    summary = train(Recipe.model_validate(recipe))
    sys.exit(128 + summary["signal"] if summary["signal"] else 0)


@pytest.fixture
def team() -> Iterator[Callable[..., list[int]]]:
    """Train a recipe with several processes, as torchrun does; gives their exit codes.

    They are forked from a server that has imported everything already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["microdit.trainer.train", "tests.trainer.conftest"])
    started = []

    def run(recipe: Recipe, world: int = 2, at: tuple[int, int, int] | None = None, backend: str = "eager"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = environment, recipe.model_dump(mode="json"), at, backend
        members = [context.Process(target=_member, args=(rank, *arguments)) for rank in range(world)]
        started.extend(members)
        for member in members:
            member.start()
        for member in members:
            member.join()
        return [member.exitcode for member in members]

    yield run
    for member in started:
        member.kill()
