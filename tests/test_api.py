"""The public interface: what its import costs, what it names, and the examples in its docstrings, which really run."""

import doctest
import importlib
import inspect
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

import microdit
from microdit.model.latent_diffusion import create_latent_diffusion
from microdit.model.network import MicroDiT
from microdit.model.text_to_image import MicroDiTPipeline
from microdit.pipeline.access.reader import CorpusReader
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import load_config
from tests.pipeline.helpers.dataset_archives import write_tar

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "ray", "duckdb", "pyarrow", "pydantic", "numpy", "transformers", "diffusers", "typer")
MODULES = (
    "microdit",
    "microdit.model.network",
    "microdit.model.text_to_image",
    "microdit.model.latent_diffusion",
    "microdit.pipeline.access.reader",
)


def examples(module: ModuleType) -> dict[str, doctest.DocTest]:
    return {test.name: test for test in doctest.DocTestFinder().find(module) if test.examples}


EXAMPLES = {name: test for module in MODULES for name, test in examples(importlib.import_module(module)).items()}
BUILD = "microdit.build"

CONFIG = """
name: mine
corpus: my/corpus
sources:
  pictures: {adapter: webdataset, files: my/pictures.tar}
images: {min_side: 32}
columns:
  captions/source: {}
  scores/basic: {}
  latents/demo-64: {autoencoder: demo, resolution: 64}
"""


def pictures() -> dict[str, bytes]:
    """Eight small pictures and their captions, as members of a tar."""
    members: dict[str, bytes] = {}
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg")
        members |= {f"{number}.jpg": buffer.getvalue(), f"{number}.txt": f"picture {number}".encode()}
    return members


def run(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    runner.run(EXAMPLES[name], out=said.append, clear_globs=False)
    assert not runner.failures, "".join(said)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The current folder has `my/corpus`, which the example of `build` makes of `my/config.yaml`; Ray runs here."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "my").mkdir()
    (folder / "my/config.yaml").write_text(CONFIG)
    write_tar(folder / "my/pictures.tar", pictures())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for setting in ("raylet_start_wait_time_s", "worker_register_timeout_seconds"):
            patch.setenv(f"RAY_{setting}", "300")  # as in tests/pipeline/conftest.py
        run(BUILD)
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100 << 20,
        )
        yield
        ray.shutdown()


@pytest.mark.usefixtures("corpus")
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != BUILD])
def test_example(name: str) -> None:
    run(name)


@pytest.mark.usefixtures("corpus")
def test_build_takes_a_config_too_and_goes_on() -> None:
    few = ["shard_samples=4"]
    config = load_config("my/config.yaml", few)
    summary = microdit.build(config, corpus=Path("my/corpus"), columns=["images", "scores/basic"])
    assert (summary.worked, summary.exit_status, summary.columns["scores/basic"].out) == (False, 0, 8)
    with pytest.raises(RequestError, match="overrides are for the path of a config"):
        microdit.build(config, few)
    with pytest.raises(RequestError, match=r"its shard_samples is 4"):
        microdit.build("my/config.yaml", corpus="my/corpus")


def test_every_public_thing_has_an_example() -> None:
    described = set(EXAMPLES)
    for name in microdit.__all__:
        thing = getattr(microdit, name)
        assert f"{thing.__module__}.{thing.__name__}" in described, name
    methods = [name for name, _ in inspect.getmembers(CorpusReader, inspect.isfunction) if not name.startswith("_")]
    assert {f"microdit.pipeline.access.reader.CorpusReader.{name}" for name in methods if name != "counts"} <= described


def test_names() -> None:
    assert (microdit.MicroDiT, microdit.MicroDiTPipeline) == (MicroDiT, MicroDiTPipeline)
    assert microdit.create_latent_diffusion is create_latent_diffusion
    assert set(microdit.__all__) <= set(dir(microdit))
    with pytest.raises(AttributeError, match="module 'microdit' has no attribute 'Microdit'"):
        _ = microdit.Microdit  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        exec("from microdit import nothing_of_this_name")


@pytest.mark.parametrize(
    ("program", "allowed"),
    [
        ("import microdit", ()),
        ("from microdit import open_corpus, build", ()),
        ("import microdit; microdit.open_corpus", ()),
        ("from microdit import MicroDiT", ("torch", "numpy")),
        ("from microdit.pipeline.access.reader import CorpusReader", ("pyarrow", "pydantic", "numpy")),
    ],
)
def test_an_import_brings_nothing_heavy(program: str, allowed: tuple[str, ...]) -> None:
    program += f"\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= set(allowed)
