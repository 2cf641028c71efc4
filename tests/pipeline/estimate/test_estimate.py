"""Estimates: learned from real small builds and compared with larger ones; the command; wrong requests."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli.app import app
from microdit.pipeline.config.build import load_config
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.estimate.estimate import Machines
from microdit.pipeline.upkeep.status import status
from tests.pipeline.helpers.tar_build import (
    COLUMNS,
    INPUTS,
    build,
    config_of,
    planned,
    small,
    write_tars,
)

__all__ = ["small"]


@pytest.mark.parametrize(("shard_samples", "tolerance"), [(25, 0.03), (60, 0.06)])
def test_bytes_are_those_of_the_real_build(small: Corpus, tmp_path: Path, shard_samples: int, tolerance: float) -> None:
    config = config_of(tmp_path, write_tars(tmp_path / "tars", 2, 3), shard_samples)
    found = planned(config, learn_from=small.url)
    real = status(build(config))
    assert found["learned_from"] == small.url
    assert found["totals"]["inputs"] == 3 * INPUTS and found["totals"]["not_measured"] == []
    assert found["totals"]["shards"] == real.columns[IMAGES]["own"].done
    for column, entry in found["columns"].items():
        there = real.columns[column]["own"]
        assert entry["bytes"] == pytest.approx(there.bytes, rel=tolerance), column
        assert (entry["in"], entry["out"], entry["failed"]) == (there.inputs, there.out, there.failed)
        assert "earlier build" in entry["origin"]
    assert found["totals"]["bytes"] == sum(entry["bytes"] for entry in found["columns"].values())


def test_what_was_made_otherwise_teaches_nothing(small: Corpus, tmp_path: Path) -> None:
    files, changed = (
        write_tars(tmp_path / "tars", 2, 1),
        {**COLUMNS, "latents/demo-64": {"autoencoder": "demo", "resolution": 96}},
    )
    found = planned(config_of(tmp_path, files, columns=changed), learn_from=small.url)
    assert found["columns"]["latents/demo-64"]["origin"] == "shapes"
    assert any("resolution was 64, is 96" in line for line in found["assumptions"])
    found = planned(config_of(tmp_path, files, images={"min_side": 32, "quality": 50}), learn_from=small.url)
    assert "earlier build" not in found["columns"][IMAGES]["origin"]
    assert "earlier build" in found["columns"]["captions/source"]["origin"]


def test_the_own_corpus_is_learned_from(small: Corpus, tmp_path: Path) -> None:
    config = config_of(tmp_path, str(Path(small.url).parent / "tars/*.tar"))
    assert planned(config.model_copy(update={"corpus": small.url}))["learned_from"] == small.url
    with pytest.raises(RequestError, match="--samples own=N"):
        planned(config)
    found = planned(config, samples={"": 1000})
    assert found["learned_from"] is None and found["totals"]["inputs"] == 1000


@pytest.mark.parametrize("name", ["37m", "37m-ostris", "22m-real", "1pct", "synthetic"])
def test_shipped_configs_are_planned_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any) -> None:
        raise AssertionError("a plan asked the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    found = planned(load_config(f"configs/microdit-{name}.yaml"), Machines(gpus=8, gpu="h100"))
    totals = found["totals"]
    assert totals["inputs"] == sum(one["inputs"] for one in found["sources"].values()) > 300_000
    assert totals["bytes"] == sum(one["bytes"] for one in found["columns"].values())
    assert all(one["in"] == one["out"] + one["failed"] == totals["inputs"] for one in found["columns"].values())
    assert all(one["origin"] for kind in ("sources", "columns", "stages") for one in found[kind].values())
    assert totals["seconds"] > 0 and found["money"]["build"] > 0


def test_the_papers_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(load_config("configs/microdit-37m.yaml"), Machines(gpus=8, gpu="h100"))
    assert found["totals"]["inputs"] == 11_185_362 + 10_968_539 + 25_119 + 4_453_193 + 14_000_000
    for column, sample in (
        ("latents/sdxl-256", 8_192),
        ("latents/sdxl-512", 32_768),
        ("text/dfn-clip-h@source", 157_696),
    ):
        entry = found["columns"][column]
        assert entry["out"] * sample < entry["bytes"] < entry["out"] * (sample + 1_300)
    assert "at most" in found["columns"]["text/t5-xxl@source"]["origin"]
    hundredth = planned(load_config("configs/microdit-1pct.yaml"), Machines(gpus=8, gpu="h100"))
    assert hundredth["sources"]["sa1b"]["inputs"] == pytest.approx(111_854, abs=1)
    assert hundredth["sources"]["diffusiondb"] | {"origin": ""} == {
        "units": 140, "inputs": 140_000, "shards": 140, "fetched_bytes": 65_000_000_000, "origin": "",
    }  # fmt: skip


def test_the_command(small: Corpus, tmp_path: Path) -> None:
    config = ["plan", "configs/microdit-37m-ostris.yaml", "--gpus", "8", "--gpu", "h100", "sources.cc12m.units=10"]
    plain, as_json = (CliRunner().invoke(app, [*config, *more]) for more in ([], ["--json"]))
    assert plain.exit_code == as_json.exit_code == 0, plain.output
    answer = json.loads(as_json.stdout)
    assert len(as_json.stdout.splitlines()) == 1 and answer["sources"]["cc12m"]["units"] == 10
    for word in (
        "latents/ostris-512",
        "by arithmetic, not measured",
        "not measured, and not in it",
        "assumed:",
        "money",
    ):
        assert word in plain.stdout
    for line in answer["assumptions"]:
        assert f"  - {line}" in plain.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8"], "--gpus 8: of which kind? Give --gpu, one of a100"),
        (["--gpu", "h100"], "--gpu h100: how many?"),
        (["--gpus", "8", "--gpu", "abacus"], "--gpu abacus: no such kind is known; expected one of a100"),
        (["--from", "no/such/corpus"], "there is no corpus.json"),
        (["--samples", "many"], "--samples many: expected a number"),
        (["--samples", "other=5"], "--samples other=...: there is no such source"),
        (["--samples", "5"], "every source says how many"),
        (["sources.own={adapter: parquet, files: 's3://x/*.parquet'}"], "--samples own=N"),
        (["columns.latents/mine-64={autoencoder: my/vae, resolution: 64}"], "the shape of its latents is not known"),
        (["columns.text/mine@source={encoder: my/t5}"], "the shape of its embeddings is not known"),
    ],
)
def test_a_wrong_request(words: list[str], message: str) -> None:
    found = CliRunner().invoke(app, ["plan", "configs/microdit-37m.yaml", *words])
    assert found.exit_code == 2 and message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1 and not found.stdout


@pytest.mark.parametrize(("name", "inputs"), [("modern-20m", 20_265_279), ("synthetic-modern", 11_890_279)])
def test_the_configs_of_newer_sets_are_planned_without_network(
    name: str, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = planned(load_config(f"configs/{name}.yaml"), Machines(gpus=8, gpu="h100"))
    assert sum(source["inputs"] for source in found["sources"].values()) == inputs
    assert {source["origin"] for source in found["sources"].values()} == {"written about the dataset"}
