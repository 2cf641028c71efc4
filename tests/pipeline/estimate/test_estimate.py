"""Plans: learned from real small builds and compared with larger ones; from nothing; and wrong requests."""

import io
import json
import math
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from microdit.model.pretrained.autoencoder import AUTOENCODERS, autoencoder_fingerprint
from microdit.model.pretrained.text_registry import TEXT_ENCODERS
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli.app import app
from microdit.pipeline.config.build import BuildConfig, load_config
from microdit.pipeline.corpus import attempt as attempts
from microdit.pipeline.corpus.arrays import array_bytes, arrays_bytes
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.quantised import Storage, quantise
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.estimate import rates
from microdit.pipeline.estimate.estimate import Machines, estimate
from microdit.pipeline.estimate.past_build import Earlier, spread
from microdit.pipeline.estimate.source_sizes import Expected, parse_samples
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import Task, UnitTask
from microdit.pipeline.upkeep.status import status
from tests.pipeline.helpers.dataset_archives import write_tar

INPUTS = 60  # of a tar
WORDS = ["red", "green", "small", "old", "round", "a", "the", "of", "with", "house", "tree", "boat", "river", "sky"]

COLUMNS: dict[str, Any] = {
    "captions/source": {},
    "scores/basic": {},
    "latents/demo-64": {"autoencoder": "demo", "resolution": 64},
    "text/minilm@source": {"encoder": "minilm"},
}


# -- a small build, and a larger one -----------------------------------------------------------------------------------
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
    declare(corpus, config)
    for source in sources_of(config):
        with source.running(corpus, print):
            for unit in source.units():
                ingest_unit(corpus, source, UnitTask(unit), config)
    for stage in sorted(stages_of(config), key=lambda stage: stage.name.startswith("text")):
        for commit in corpus.commits(IMAGES):
            stage.run(corpus, Task(commit.ref, dict.fromkeys(stage.columns, 0)))
    return corpus


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("small")
    return build(config_of(folder, write_tars(folder / "tars", 0, 2)))


@pytest.mark.parametrize(("shard_samples", "tolerance"), [(25, 0.03), (60, 0.06)])
def test_bytes_are_those_of_the_real_build(small: Corpus, tmp_path: Path, shard_samples: int, tolerance: float) -> None:
    config = config_of(tmp_path, write_tars(tmp_path / "tars", 2, 3), shard_samples)
    found = estimate(config, learn_from=small.url)
    real = status(build(config))
    assert found["learned_from"] == small.url
    assert found["totals"]["inputs"] == 3 * INPUTS and found["totals"]["not_measured"] == []
    assert found["totals"]["shards"] == real["columns"][IMAGES]["own"]["done"]
    for column, entry in found["columns"].items():
        there = real["columns"][column]["own"]
        assert entry["bytes"] == pytest.approx(there["bytes"], rel=tolerance), column
        assert (entry["in"], entry["out"], entry["failed"]) == (there["in"], there["out"], there["failed"])
        assert "earlier build" in entry["origin"]
    assert found["totals"]["bytes"] == sum(entry["bytes"] for entry in found["columns"].values())


def test_commits_say_what_was_worked(small: Corpus) -> None:
    for column in (IMAGES, *COLUMNS):
        for commit in small.commits(column):
            assert commit.device == "cpu" and 0 <= commit.timings["cpu_seconds"] < 600
            assert ("wait_seconds" in commit.timings) is (column == IMAGES)
    pace = Earlier(small.url).pace([IMAGES], "own")
    assert pace is not None and pace.has_cpu and pace.devices == {"cpu"} and pace.shards == 6


def test_a_column_that_was_not_built_comes_from_its_shape(small: Corpus, tmp_path: Path) -> None:
    more = {"latents/demo-128": {"autoencoder": "demo", "resolution": 128}, "text/t5-xxl@source": {"encoder": "t5-xxl"}}
    config = config_of(tmp_path, write_tars(tmp_path / "tars", 2, 1), columns={**COLUMNS, **more})
    found = estimate(config, learn_from=small.url)
    latents, text = found["columns"]["latents/demo-128"], found["columns"]["text/t5-xxl@source"]
    real = build(
        config_of(tmp_path, str(tmp_path / "tars/*.tar"), columns={"latents/demo-128": more["latents/demo-128"]})
    )
    assert latents["origin"] == "shapes" and "words" in text["origin"]
    assert latents["out"] == text["out"] == found["columns"][IMAGES]["out"] == 55
    assert latents["bytes"] == pytest.approx(status(real)["columns"]["latents/demo-128"]["own"]["bytes"], rel=0.1)
    assert 55 * 4 * 8192 < text["bytes"] < 55 * 25 * 8192  # three to twelve words
    assert found["totals"]["not_measured"] == ["text:t5-xxl@source"]
    assert found["stages"]["text:t5-xxl@source"]["seconds"] is None and not found["money"]["complete"]


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_quantised_column_comes_from_its_shape(storage: Storage, small: Corpus, tmp_path: Path) -> None:
    columns = {**COLUMNS, "text/t5-xxl@source": {"encoder": "t5-xxl", "storage": storage}}
    config = config_of(tmp_path, write_tars(tmp_path / "tars", 2, 1), columns=columns)
    whole = estimate(config, learn_from=small.url)["columns"]["text/t5-xxl@source"]
    plain = {**columns, "text/t5-xxl@source": {"encoder": "t5-xxl"}}
    less = estimate(config_of(tmp_path, str(tmp_path / "tars/*.tar"), columns=plain), learn_from=small.url)
    embedding = torch.zeros(6, 4096)
    stored = len(arrays_bytes({name: tensor.numpy() for name, tensor in quantise(embedding, storage).items()}))
    ratio = stored / len(array_bytes(embedding.half().numpy()))
    assert whole["bytes"] / less["columns"]["text/t5-xxl@source"]["bytes"] == pytest.approx(ratio, rel=0.1)


def test_what_was_made_otherwise_teaches_nothing(small: Corpus, tmp_path: Path) -> None:
    files, changed = (
        write_tars(tmp_path / "tars", 2, 1),
        {**COLUMNS, "latents/demo-64": {"autoencoder": "demo", "resolution": 96}},
    )
    found = estimate(config_of(tmp_path, files, columns=changed), learn_from=small.url)
    assert found["columns"]["latents/demo-64"]["origin"] == "shapes"
    assert any("resolution was 64, is 96" in line for line in found["assumptions"])
    found = estimate(config_of(tmp_path, files, images={"min_side": 32, "quality": 50}), learn_from=small.url)
    assert "earlier build" not in found["columns"][IMAGES]["origin"]
    assert "earlier build" in found["columns"]["captions/source"]["origin"]


def test_the_own_corpus_is_learned_from(small: Corpus, tmp_path: Path) -> None:
    config = config_of(tmp_path, str(Path(small.url).parent / "tars/*.tar"))
    assert estimate(config.model_copy(update={"corpus": small.url}))["learned_from"] == small.url
    with pytest.raises(RequestError, match="--samples own=N"):
        estimate(config)
    found = estimate(config, samples={"": 1000})
    assert found["learned_from"] is None and found["totals"]["inputs"] == 1000


# -- time --------------------------------------------------------------------------------------------------------------
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


def test_time_is_that_of_the_narrowest_place(tmp_path: Path) -> None:
    timed(tmp_path, seconds=8, cpu_seconds=6, wait_seconds=2)
    config = timed_config(tmp_path, 1000)
    time = estimate(config, Machines(cpus=2))["totals"]
    # 100 shards of 10, of two stages; on two CPUs one actor, and two units at once
    assert time["cpu_seconds"] == pytest.approx(2 * 100 * 6)
    assert time["bounds"]["the processors"] == pytest.approx(600)
    assert time["bounds"]["the workers of ingest"] == pytest.approx(100 * (8 + 2) / 2)
    assert time["bounds"]["the workers of latents"] == pytest.approx(800)
    assert time["narrowest"] == "the workers of latents" and 800 < time["seconds"] < 900
    wide = estimate(config, Machines(cpus=64))["totals"]
    assert wide["bounds"]["the processors"] == pytest.approx(1200 / 64) and wide["seconds"] < time["seconds"]
    money = estimate(config, Machines(cpus=2, cpu_price=3.6, storage_price=1e12))
    assert money["money"]["build"] == pytest.approx(time["seconds"] * 2 * 0.001)
    assert money["money"]["storage_a_month"] == pytest.approx(money["totals"]["bytes"])


def test_a_gpus_times_count_for_its_kind_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_device", lambda: "NVIDIA H100 80GB HBM3")
    timed(tmp_path, seconds=8, cpu_seconds=1)
    config = timed_config(tmp_path, 1000)
    found = estimate(config, Machines(gpus=4, gpu="H100", gpu_price=2.0))
    assert found["totals"]["gpu_seconds"] == pytest.approx(800) and found["machines"]["gpu"] == "h100"
    assert found["totals"]["bounds"]["the GPUs"] == pytest.approx(200)
    assert "earlier build" in found["stages"]["latents"]["origin"]
    assert found["money"]["gpus"] == pytest.approx(found["totals"]["seconds"] / 3600 * 8)
    other = estimate(config, Machines(gpus=4, gpu="a100"))
    assert "by arithmetic, not measured" in other["stages"]["latents"]["origin"]
    assert other["money"]["build"] is None and any("--gpu-price" in line for line in other["assumptions"])
    assert estimate(config, Machines(cpus=4))["totals"]["not_measured"] == ["latents"]


def test_commits_without_cpu_seconds_are_taken_for_busy(tmp_path: Path) -> None:
    corpus = timed(tmp_path, seconds=8, cpu_seconds=1)
    for path in sorted(Path(corpus.url).glob("commits/**/*-00.0.json")):
        record = json.loads(path.read_text())
        del record["timings"]["cpu_seconds"], record["device"]  # as they were
        path.write_text(json.dumps(record))
    found = estimate(timed_config(tmp_path, 1000), Machines(cpus=2))
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
    found = estimate(timed_config(tmp_path, 1000), Machines(gpus=2, gpu="h100"))
    assert found["totals"]["gpu_seconds"] == pytest.approx(1) and "`x.py`" in found["stages"]["latents"]["origin"]
    assert found["totals"]["not_measured"] == ["ingest"]


# -- from what is written ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["37m", "37m-ostris", "22m-real", "1pct", "synthetic"])
def test_shipped_configs_are_planned_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any) -> None:
        raise AssertionError("a plan asked the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    found = estimate(load_config(f"configs/microdit-{name}.yaml"), Machines(gpus=8, gpu="h100"))
    totals = found["totals"]
    assert totals["inputs"] == sum(one["inputs"] for one in found["sources"].values()) > 300_000
    assert totals["bytes"] == sum(one["bytes"] for one in found["columns"].values())
    assert all(one["in"] == one["out"] + one["failed"] == totals["inputs"] for one in found["columns"].values())
    assert all(one["origin"] for kind in ("sources", "columns", "stages") for one in found[kind].values())
    assert totals["seconds"] > 0 and found["money"]["build"] > 0


def test_no_captioner_is_taken_for_a_copied_caption() -> None:
    asked = {"vl": "{vlm: qwen3-vl-4b}", "e": "{endpoint: 'http://x/v1', model: m}", "t": "{tags: efficientnet-lite0}"}
    config = load_config("configs/microdit-1pct.yaml", [f"columns.captions/{k}={v}" for k, v in asked.items()])
    stages = estimate(config, Machines(gpus=8, gpu="h100"))["stages"]
    for name, device in (("captions:vl", "h100"), ("captions/e", "cpu"), ("captions:t", "h100")):
        assert stages[name]["origin"].startswith("not measured") and stages[name]["device"] == device
        assert stages[name]["seconds"] is None
    assert stages["captions/source"]["seconds"] > 0


def test_the_papers_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate(load_config("configs/microdit-37m.yaml"), Machines(gpus=8, gpu="h100"))
    assert found["totals"]["inputs"] == 11_185_362 + 10_968_539 + 25_119 + 4_453_193 + 14_000_000
    for column, sample in (
        ("latents/sdxl-256", 8_192),
        ("latents/sdxl-512", 32_768),
        ("text/dfn-clip-h@source", 157_696),
    ):
        entry = found["columns"][column]
        assert entry["out"] * sample < entry["bytes"] < entry["out"] * (sample + 1_300)
    assert "at most" in found["columns"]["text/t5-xxl@source"]["origin"]
    hundredth = estimate(load_config("configs/microdit-1pct.yaml"), Machines(gpus=8, gpu="h100"))
    assert hundredth["sources"]["sa1b"]["inputs"] == pytest.approx(111_854, abs=1)
    assert hundredth["sources"]["diffusiondb"] | {"origin": ""} == {
        "units": 140, "inputs": 140_000, "shards": 140, "fetched_bytes": 65_000_000_000, "origin": "",
    }  # fmt: skip


def test_shapes_are_those_of_the_models() -> None:
    assert rates.AUTOENCODERS.keys() == AUTOENCODERS.keys() and rates.ENCODERS.keys() == TEXT_ENCODERS.keys()
    for name, encoder in rates.ENCODERS.items():
        if (most := TEXT_ENCODERS[name].max_tokens) is not None:
            assert encoder.tokens == most
    assert autoencoder_fingerprint("demo")["normaliser"] and rates.AUTOENCODERS["demo"] == (4, 8)
    assert all(rate.rate > 0 and rate.command and rate.date for rate in rates.table())
    assert all(rate.device in {rates.CPU, *rates.GPUS} for rate in rates.table())


@pytest.mark.parametrize(
    ("device", "kind", "same"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", True),
        ("NVIDIA H100 80GB HBM3", "h200", False),
        ("NVIDIA A100-SXM4-80GB", "a100", True),
        ("NVIDIA L40S", "l40s", True),
        ("NVIDIA L40S", "l4", False),
        ("NVIDIA GeForce RTX 4090", "rtx4090", True),
        ("cpu", "h100", False),
    ],
)
def test_a_devices_name_tells_its_kind(device: str, kind: str, same: bool) -> None:
    assert rates.is_kind(device, kind) is same


# -- what is counted ---------------------------------------------------------------------------------------------------
@given(st.integers(1, 3000), st.integers(1, 700), st.integers(1, 300))
def test_shards_are_those_of_the_cut(inputs: int, unit_inputs: int, shard_samples: int) -> None:
    units = [min(unit_inputs, inputs - start) for start in range(0, inputs, unit_inputs)]
    found = Expected(len(units), inputs, "", unit_inputs=unit_inputs).shards(shard_samples)
    assert found == sum(math.ceil(unit / shard_samples) for unit in units)


@given(st.integers(0, 2000), st.integers(1, 300))
def test_spread_takes_some_of_all(count: int, most: int) -> None:
    taken = spread(range(count), most)
    assert len(taken) == min(count, most) == len(set(taken)) and taken == sorted(taken)
    assert not taken or (taken[0] == 0 and count - taken[-1] <= 2 * count / most + 1)


@settings(max_examples=200)
@given(st.lists(st.one_of(st.text(max_size=8), st.from_regex(r"([a-c]=)?\d{1,3}", fullmatch=True)), max_size=3))
def test_samples_are_numbers_or_refused(texts: list[str]) -> None:
    try:
        found = parse_samples(texts)
    except RequestError as error:
        assert "--samples" in str(error)
    else:
        assert len(found) == len(texts) and min(found.values(), default=1) > 0


# -- the command -------------------------------------------------------------------------------------------------------
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


def test_an_empty_corpus_teaches_nothing(tmp_path: Path) -> None:
    Corpus.create(tmp_path, "empty", 10)
    with pytest.raises(RequestError, match="no shard of it is committed"):
        Earlier(str(tmp_path))
