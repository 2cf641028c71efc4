"""Times of stages and of the build: by the narrowest resource, the past build, the table, or arithmetic."""

import json
from pathlib import Path

import pytest

from microdit.pipeline.config.build import BuildConfig, load_config
from microdit.pipeline.corpus import attempt as attempts
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.estimate import rates
from microdit.pipeline.estimate.estimate import Machines
from tests.pipeline.helpers.tar_build import planned


def timed(folder: Path, **timings: float) -> Corpus:
    """Two units of one shard of ten; every stage took these times for each."""
    corpus = Corpus.create(folder / "corpus", "timed", 10)
    corpus.declare_source("own", {"adapter": "urls"})
    corpus.declare_column(IMAGES, {"stage": "ingest"})
    corpus.declare_column(
        "latents/x", {"stage": "latents", "autoencoder": "sdxl", "resolution": 256, "posterior": "sample"}
    )
    for unit in ("own-000000", "own-000001"):
        ref = ShardRef(source="own", unit=unit, shard=f"{unit}-00")
        for column in (IMAGES, "latents/x"):
            inputs = [] if column == IMAGES else [corpus.commit(IMAGES, "own", ref.shard, 0)]
            with begin_attempt(corpus, column, ref, inputs) as attempt:
                for row in range(10):
                    attempt.add(row, f"k{row}", {"npy": b"x" * 1000})
                attempt.commit(**timings if column == IMAGES else timings | {"wait_seconds": 0.0})
        commit_unit(corpus, "own", unit, 10, [f"{unit}-00"])
    return corpus


def timed_config(folder: Path, lines: int) -> BuildConfig:
    (folder / "list.tsv").write_text("http://127.0.0.1/a\tx\n" * lines)
    sources = {"own": {"adapter": "urls", "list": str(folder / "list.tsv"), "unit_inputs": 10}}
    columns = {"latents/x": {"autoencoder": "sdxl", "resolution": 256}}
    given = {"name": "timed", "corpus": str(folder / "corpus"), "shard_samples": 10}
    return BuildConfig.model_validate({**given, "sources": sources, "columns": columns})


def test_time_is_that_of_the_narrowest_resource(tmp_path: Path) -> None:
    timed(tmp_path, seconds=8, cpu_seconds=6, wait_seconds=2)
    config = timed_config(tmp_path, 1000)
    time = planned(config, Machines(cpus=2))["totals"]
    # 100 shards of 10, of two stages; on two CPUs one actor, and two units at once
    assert time["cpu_seconds"] == pytest.approx(2 * 100 * 6)
    assert time["bounds"]["the processors"] == pytest.approx(600)
    assert time["bounds"]["the workers of ingest"] == pytest.approx(100 * (8 + 2) / 2)
    assert time["bounds"]["the workers of latents"] == pytest.approx(800)
    assert time["narrowest"] == "the workers of latents" and 800 < time["seconds"] < 900
    wide = planned(config, Machines(cpus=64))["totals"]
    assert wide["bounds"]["the processors"] == pytest.approx(1200 / 64) and wide["seconds"] < time["seconds"]
    money = planned(config, Machines(cpus=2, cpu_price=3.6, storage_price=1e12))
    assert money["money"]["build"] == pytest.approx(time["seconds"] * 2 * 0.001)
    assert money["money"]["storage_a_month"] == pytest.approx(money["totals"]["bytes"])


def test_a_gpus_times_count_for_its_kind_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_device", lambda: ("NVIDIA H100 80GB HBM3", "one"))
    timed(tmp_path, seconds=8, cpu_seconds=1)
    config = timed_config(tmp_path, 1000)
    found = planned(config, Machines(gpus=4, gpu="H100", gpu_price=2.0))
    assert found["totals"]["gpu_seconds"] == pytest.approx(800) and found["machines"]["gpu"] == "h100"
    assert found["totals"]["bounds"]["the GPUs"] == pytest.approx(200)
    assert "earlier build" in found["stages"]["latents"]["origin"]
    assert found["money"]["gpus"] == pytest.approx(found["totals"]["seconds"] / 3600 * 8)
    other = planned(config, Machines(gpus=4, gpu="a100"))
    assert "by arithmetic, not measured" in other["stages"]["latents"]["origin"]
    assert other["money"]["build"] is None and any("--gpu-price" in line for line in other["assumptions"])
    assert planned(config, Machines(cpus=4))["totals"]["not_measured"] == ["latents"]


def test_commits_without_cpu_seconds_are_taken_for_busy(tmp_path: Path) -> None:
    corpus = timed(tmp_path, seconds=8, cpu_seconds=1)
    for path in sorted(Path(corpus.url).glob("commits/**/*-00.0.json")):
        record = json.loads(path.read_text())
        del record["timings"]["cpu_seconds"], record["device"]  # as they were
        path.write_text(json.dumps(record))
    found = planned(timed_config(tmp_path, 1000), Machines(cpus=2))
    assert found["totals"]["cpu_seconds"] == pytest.approx(2 * 100 * 8)
    assert any("no CPU seconds" in line for line in found["assumptions"])


def test_a_measured_rate_says_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = rates.Rate(
        stage="latents",
        model="sdxl",
        resolutions=(256,),
        device="h100",
        rate=1000,
        command="x.py",
        machine="m",
        date="2026",
    )
    monkeypatch.setattr(rates, "table", lambda: (rate,))
    found = planned(timed_config(tmp_path, 1000), Machines(gpus=2, gpu="h100"))
    assert found["totals"]["gpu_seconds"] == pytest.approx(1) and "`x.py`" in found["stages"]["latents"]["origin"]
    assert found["totals"]["not_measured"] == ["ingest"]


def test_no_captioner_is_taken_for_a_copied_caption() -> None:
    asked = {"vl": "{vlm: qwen3-vl-4b}", "e": "{endpoint: 'http://x/v1', model: m}", "t": "{tags: efficientnet-lite0}"}
    config = load_config("configs/microdit-1pct.yaml", [f"columns.captions/{k}={v}" for k, v in asked.items()])
    stages = planned(config, Machines(gpus=8, gpu="h100"))["stages"]
    for name, device in (("captions:vl", "h100"), ("captions/e", "cpu"), ("captions:t", "h100")):
        assert stages[name]["origin"].startswith("not measured") and stages[name]["device"] == device
        assert stages[name]["seconds"] is None
    assert stages["captions/source"]["seconds"] > 0
