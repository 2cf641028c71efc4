"""`microdit plan` of pictures that models make: from published figures with their source, or from a past build."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from microdit.pipeline.cli.shown_plan import show
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.estimate.estimate import Machines, estimate
from microdit.pipeline.estimate.makers import _seconds, published
from tests.pipeline.helpers.tar_build import planned

KLEIN = {"model": "black-forest-labs/FLUX.2-klein-4B", "size": 512}
TURBO = {"model": "Tongyi-MAI/Z-Image-Turbo", "size": 1024}


def config_of(folder: Path, *makers: dict[str, Any], prompts: int = 1000, images: int = 4) -> BuildConfig:
    (folder / "p.txt").write_text("".join(f"prompt {number}\n" for number in range(prompts)))
    source = {"adapter": "synthesize", "prompts": {"path": str(folder / "p.txt")}, "makers": list(makers)}
    return BuildConfig.model_validate(
        {
            "name": "drawn",
            "corpus": str(folder / "corpus"),
            "sources": {"drawn": source | {"images_per_prompt": images, "prompts_per_unit": 100}},
            "resources": {"scratch": str(folder / "scratch")},
            "columns": {"captions/source": {}},
        }
    )


def test_a_published_figure_with_its_source(tmp_path: Path):
    found = planned(config_of(tmp_path, KLEIN), Machines(gpus=2, gpu="h100", gpu_price=3.6))
    assert found["sources"]["drawn"]["inputs"] == 4000 and found["sources"]["drawn"]["units"] == 10
    stage, maker = found["stages"]["drawn:flux.2-klein-4b"], found["makers"]["drawn:flux.2-klein-4b"]
    assert stage["gpu_seconds"] == pytest.approx(4000 * 0.19) and stage["seconds"] == pytest.approx(4000 * 0.19 / 2)
    assert maker["images"] == 4000 and maker["gpu_hours"] == pytest.approx(4000 * 0.19 / 3600)
    assert maker["money"] == pytest.approx(4000 * 0.19 / 1000)
    assert "published" in maker["origin"] and "not measured here" in maker["origin"]
    assert "ingest" not in found["stages"]
    assert found["totals"]["bounds"]["the GPUs"] == pytest.approx(4000 * 0.19 / 2)


def test_other_sizes_steps_and_gpus_are_in_proportion_and_said_to_be(tmp_path: Path):
    klein = KLEIN | {"size": [256, 512], "steps": 8}
    found = planned(config_of(tmp_path, klein), Machines(gpus=1, gpu="a100"))["makers"]["drawn:flux.2-klein-4b"]
    assert found["gpu_hours"] * 3600 == pytest.approx(4000 * 0.19 * 2 * 0.5 * 989 / 312)
    assert "8 steps for 4, 131,072 pixels for 262,144, a100 for h100" in found["origin"]
    assert found["money"] is None  # nobody knows the price of that GPU


def test_a_model_that_nobody_measured_is_not_in_the_total(tmp_path: Path):
    config = config_of(tmp_path, KLEIN | {"weight": 3}, {"model": "somebody/else", "size": 512}, TURBO | {"weight": 2})
    found = planned(config, Machines(gpus=1, gpu="h100", gpu_price=2.0))
    assert [maker["images"] for maker in found["makers"].values()] == [2000, 667, 1333]
    assert found["totals"]["not_measured"] == ["drawn:else"]
    assert found["makers"]["drawn:else"] == {
        "images": 667, "gpu_hours": None, "money": None, "origin": "not measured: somebody/else on h100"
    }  # fmt: skip
    turbo = found["makers"]["drawn:z-image-turbo"]
    assert "9 steps for 8" in turbo["origin"] and turbo["gpu_hours"] * 3600 == pytest.approx(1333 * 9 / 8)
    on_cpus = planned(config, Machines(cpus=4))
    assert len(on_cpus["totals"]["not_measured"]) == 3 and on_cpus["makers"]["drawn:else"]["gpu_hours"] is None


def test_the_table_for_people(tmp_path: Path):
    found = estimate(config_of(tmp_path, KLEIN), Machines(gpus=1, gpu="h100"))
    console = Console(width=300, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    show(found, console, lambda size: f"{size} bytes")
    text = console.export_text()
    assert "GPU hours" in text and "$0.79" in text and "published for one H100" in text


def test_the_published_figures_name_their_sources():
    assert len(published()) >= 3 and all(entry.source and entry.seconds > 0 for entry in published())


def past(folder: Path, maker: str, steps: int) -> Corpus:
    """A corpus whose pictures one maker has drawn: two units of ten."""
    corpus = Corpus.create(folder / "past", "drawn", 10)
    corpus.declare_source("drawn", {"adapter": "synthesize"})
    corpus.declare_column(IMAGES, {"stage": "ingest"}, {"fields": "string"})
    for unit in ("drawn-000000", "drawn-000001"):
        with begin_attempt(corpus, IMAGES, ShardRef(source="drawn", unit=unit, shard=f"{unit}-00")) as attempt:
            fields = json.dumps({"maker": maker, "steps": steps, "size": "512x512"})
            for row in range(10):
                attempt.add(row, f"k{row}", {"png": b"x" * 1000}, fields=fields)
            attempt.commit(seconds=15.0, wait_seconds=5.0, cpu_seconds=20.0)
        commit_unit(corpus, "drawn", unit, 10, [f"{unit}-00"])
    return corpus


def test_an_earlier_build_counts_if_its_maker_drew_alike(tmp_path: Path):
    corpus = past(tmp_path, "flux.2-klein-4b", 4)
    found = planned(config_of(tmp_path, KLEIN), Machines(cpus=2), corpus.url)
    stage = found["stages"]["drawn:flux.2-klein-4b"]
    assert stage["origin"] == "earlier build, 2 shards" and stage["cpu_seconds"] == pytest.approx(4000 * 2.0)
    for other in (KLEIN | {"steps": 8}, KLEIN | {"size": 1024}, KLEIN | {"name": "another"}):
        found = planned(config_of(tmp_path, other), Machines(cpus=2), corpus.url)
        assert found["totals"]["not_measured"] == [next(iter(found["makers"]))]


def test_a_gpus_rate_is_that_between_the_beginnings_of_its_shards():
    def commit(gpu: str, clock: str, count: int) -> Commit:
        return Commit.model_construct(attempt=f"20261201T{clock}-00000000", host="a", gpu=gpu, counts={"in": count})

    one = [commit("one", clock, 100) for clock in ("100000", "100020", "100040", "100100")]
    two = [commit("two", clock, 50) for clock in ("100000", "100010", "120000")]  # two hours' standstill
    assert _seconds([*two, *one]) == pytest.approx(70 / 350)
    assert _seconds(one[:1]) is None and _seconds([]) is None
