"""The benchmarks of the engine run, small, and say what they promise."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fast import summarize

ROOT = Path(__file__).parent.parent


def run(name: str, *options: str) -> dict[str, Any]:
    """What `benchmarks/<name>.py --json` prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_"))}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, f"benchmarks/{name}.py", *options, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_chaos() -> None:
    found = run("chaos", "--minutes", "0", "--units", "3")
    assert min(found["kills"].values()) > 0 and sum(found["faults"].values()) > 0 and found["retries"] > 0
    assert found["samples"] == found["builds"] * 3 * 48 * 4
    assert (found["lost"], found["twice"], found["other_bytes"], found["problems"]) == (0, 0, 0, 0)


@pytest.mark.slow
def test_scale() -> None:
    found = run("scale", "--shards", "1200", "--commits", "100")
    assert found["shards"] == 1200 and found["requests_per_1000_commits"] == 1.0
    assert found["commits_per_second"] > 0 and found["driver_memory_mb"] > 0


@pytest.mark.slow
def test_overhead() -> None:
    found = run("overhead", "--shards", "8", "--seconds", "0.1", "--rounds", "1")
    for kind in ("task", "actor"):
        assert found[f"{kind}_bare_seconds"] >= 0.1
        ratio = found[f"{kind}_engine_seconds"] / found[f"{kind}_bare_seconds"]
        assert found[f"{kind}_ratio"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.slow
def test_plan() -> None:
    found = run("plan", "--inputs", "160", "--times", "2")
    assert found["inputs"] == 320 and found["predicted_seconds"] > 0 and found["rates"]["latents"] > 0
    for column, one in found["columns"].items():
        assert one["predicted"] == pytest.approx(one["bytes"], rel=0.25), column  # a few rows in a shard


def test_evaluate() -> None:
    found = run("evaluate", "--pictures", "0", "--prompts", "4", "--features", "1000")
    assert found["ratio_bare"] > 0.5 and found["fid_seconds"] > 0 and found["kid_seconds"] > 0


@pytest.mark.slow
def test_synthesize() -> None:
    found = run(
        "synthesize", "--prompts", "8", "--rounds", "1", "--steps", "2", "--pixels", "32"
    )  # checks the pictures
    assert (found["kind"], found["pictures"]) == ("sd", 8)
    assert found["ratio_bare"] == pytest.approx(found["bare_seconds"] / found["stage_seconds"], rel=0.05)


def test_dedup() -> None:
    """Few pictures, but real ones; the hashes as skewed as millions of them."""
    found = run("dedup", "--images", "12", "--hashes", "30000", "--turned")
    for method in ("exact", "perceptual", "turned", "semantic"):
        assert (found[f"{method}_none_recall"], found[f"{method}_none_precision"]) == (1.0, 1.0)
    assert (found["exact_recall"], found["exact_precision"]) == (0.0, None)  # each change turns some pixel
    assert min(found["perceptual_recall"], found["turned_recall"], found["semantic_recall"]) >= 0.8
    for change in ("mirrored", "rotated", "letterboxed"):
        assert found[f"turned_{change}_recall"] == 1.0 > found[f"perceptual_{change}_recall"]
    assert found["turned_cropped_10_recall"] < 1  # what is still missed
    assert min(found["perceptual_precision"], found["semantic_precision"]) >= 0.9
    assert found["hash_recall"] >= found["goals"]["hash_recall"] and found["reference_recall"] >= 0.99
    assert found["beyond"] == 0 and found["largest"] <= found["largest_linked"]


def test_joins() -> None:
    found = run("joins", "--rows", "4000", "--entries", "3000")
    for kind, sizes in (("diffusiondb", (2000, 4000)), ("sa1b", (1000, 3000))):
        for size in sizes:
            assert found[f"{kind}_{size}_build_per_second"] > 0 and found[f"{kind}_{size}_look_up_memory_mb"] > 0


@pytest.mark.parametrize("given", [1, None])
def test_damage(given: int | None) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if given is None else given
    print(f"seed {seed}")  # shown if it fails
    found = run("damage", "--count", "150", "--seed", str(seed))
    assert (found["seed"], found["images"], found["archives"]) == (seed, 150, 3)
    assert (found["crashes"], found["hangs"], found["escaped"], found["bad_items"]) == (0, 0, 0, [])
    assert found["adds_up"] and sum(found["image_outcomes"].values()) == 150
    assert sum(found["archive_outcomes"].values()) == 3
    assert found["accepted_wrong"] <= found["accepted_damaged"] <= found["image_outcomes"]["ok"]
    scans = found["scans"]
    assert (scans["scans"], scans["padded"], scans["padded_refused"]) == (15, 3, 0)
    assert scans["forgiven_wrong"] <= scans["accepted_wrong"] <= sum(scans["outcomes"].values()) == 15
    assert found["image_outcomes"]["ok"] > 0 and len(found["image_outcomes"]) > 3
    assert found["slowest_image"]["seconds"] > 0


def test_ingest() -> None:
    found = run("ingest", "--tars", "2", "--samples", "4", "--rounds", "1")
    assert (found["images"], found["rounds"]) == (8, 1)  # the same JPEGs, which it checks itself
    assert found["ratio_bare"] == pytest.approx(found["bare_seconds"] / found["ingest_seconds"], rel=0.05)


def test_quantise() -> None:
    rows = {(row["encoder"], row["storage"]): row for row in run("quantise", "--captions", "40")["rows"]}
    assert {encoder for encoder, _ in rows} == {"minilm", "dfn-clip-h", "t5-xxl"}
    for row in rows.values():
        assert row["less"] >= (row["goal"] or 1)
        assert row["worst_sample"] < {"float16": 0.001, "int8": 0.03, "int4": 0.2}[row["storage"]]


@pytest.mark.slow
def test_encode() -> None:
    found = run(
        *("encode", "--device", "cpu", "--models", "demo", "minilm"),
        *("--shards", "2", "--samples", "5", "--unique", "4", "--rounds", "1"),
    )
    assert (found["samples"], found["t5-xxl"]) == (10, "not measured")
    images, text = found["models"]
    assert (images["model"], text["model"], text["ratio_feed"]) == ("demo", "minilm", "not measured")
    assert 0 < images["difference"] < 0.05 and 0 <= text["difference"] < 0.05  # the two ways' numbers
    for row in (images, text):
        for name, way in (("ceiling", "bare"), ("common", "common")):
            ratio = row[f"{way}_seconds"] / row["stage_seconds"]
            assert row[f"ratio_{name}"] == pytest.approx(ratio, rel=0.05)
    both = [images[f"{way}_seconds"] + text[f"{way}_seconds"] for way in ("bare", "stage")]
    assert found["ratio_ceiling"] == pytest.approx(both[0] / both[1], rel=0.05)
    assert found["ratio_feed"] == pytest.approx(images["bare_feed_seconds"] / images["feed_seconds"], rel=0.05)


@pytest.mark.slow
def test_caption() -> None:
    found = run("caption", "--images", "6", "--batch", "4", "--rounds", "1", "--max-tokens", "4", "--side", "96")
    assert (found["images"], found["device"]) == (6, "cpu")  # the same captions, which it checks itself
    assert found["ratio_bare"] == pytest.approx(found["bare_seconds"] / found["stage_seconds"], rel=0.05)


def test_loader() -> None:
    found = run("loader", "--samples", "256", "--width", "64", "--rounds", "1")  # the same samples, which it checks
    assert (found["samples"], found["ratio_streaming"]) == (256, "not measured")
    ratios = [found[f"{place}_ours_per_second"] / found[f"{place}_webdataset_per_second"] for place in ("folder", "s3")]
    assert found["ratio_webdataset"] == pytest.approx(min(ratios), rel=0.05)
    assert found["shuffle"]["source"] == pytest.approx(1, abs=0.05) and found["server_mb_per_second"] > 0


@pytest.mark.slow
def test_train_step() -> None:
    found = run("train_step", "--device", "cpu", "--pixels", "64", "--micro-batches", "2", "--repeat", "1")
    (row,) = found["rows"]
    assert found["preset"] == "tiny_2" and row["loss_difference"] < 1e-4
    assert row["ratio_reference"] == pytest.approx(row["reference_eager"]["seconds"] / row["ours"]["seconds"])
    assert row["ours"]["peak_mib"] > 0 and 0 < row["mfu"] < 1.5 and row["gflop_per_image"] > 1


@pytest.mark.slow
def test_regression() -> None:
    found = run("regression", "stages.0.images=128", "stages.1.images=64", "hold_out=32", "validate_every=2")
    assert (found["images"], found["held_out"], found["holds"]) == (192, 32, None)  # another recipe holds no line
    assert [images for images, _ in found["curve"]] == [0, 128, 192]
    assert found["curve"][-1][1] == found["loss"] < found["curve"][0][1]


def test_the_trainer_needs_no_ray() -> None:
    code = "import sys, microdit.trainer.train, benchmarks.train_step\n"
    code += "print([n for n in ('ray', 'duckdb') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("store", ["folder", "s3"])
def test_full_size(store: str) -> None:
    found = run("full_size", "--rows", "8000", "--store", store, "--only", "grown", "start")
    for name in ("first", "grown", "paper", "start"):  # with those that they need
        small, large = found[name]["2000"], found[name]["8000"]
        assert large["memory_gib"] > 0 and large["read_mb"] >= small["read_mb"] > 0
        assert (large.get("requests", 0) >= small.get("requests", 0) > 0) == (store == "s3")


@pytest.mark.slow
def test_fetch_soak() -> None:
    found = run("fetch_soak", "--urls", "4000", "--hosts", "100")
    assert (found["urls"], found["unexpected"], found["unexpected_kinds"], found["files_left"]) == (4000, 0, {}, 0)
    assert len(found["reasons"]) == 11 and found["memory_peak_mb"] < 500


@pytest.mark.slow
def test_fast() -> None:
    small = ["hold_out=32", "model.dim=64", "model.patch_mixer_dim=64", "model.depth=1"]
    found = run("fast", "--switches", "muon", "--seeds", "0,1", "--images", "256", *small)
    runs = [(row["switch"], row["seed"]) for row in found["rows"]]
    assert runs == [("off", 0), ("muon", 0), ("off", 1), ("muon", 1)]
    assert {row["images"] for row in found["rows"]} == {320}  # whole batches of both legs
    assert found["switches"]["off"]["psnr"]["moved"] is None and found["switches"]["muon"]["psnr"]["error"] is not None


def test_switches_are_held_against_their_error() -> None:
    values = {"off": [10.0, 11.0, 12.0], "muon": [14.0, 15.0, 16.0]}
    rows = [
        {"switch": name, "seed": seed, "psnr": value, "nearest": 3, "nearest_all": 1, "validation": None}
        for name, some in values.items()
        for seed, value in enumerate(some)
    ]
    found = summarize(rows)
    assert found["off"]["psnr"] == {"mean": 11.0, "error": pytest.approx(3**-0.5), "moved": None}
    assert found["muon"]["psnr"]["moved"] == pytest.approx(4 / (2 / 3) ** 0.5)
    assert found["muon"]["nearest"]["moved"] is None and "validation" not in found["muon"]


def test_fetch_list() -> None:
    found = run("fetch_list", "--rows", "3000")
    assert found["rows"] == 3000 and found["memory_mb"] < 200
