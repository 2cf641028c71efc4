import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.model.checkpoint import CheckpointError
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli.demo_evaluation import compare, distances, evaluate
from microdit.pipeline.corpus.corpus import Corpus
from microdit.trainer.train import train
from tests.trainer.conftest import short_recipe


def test_what_was_learned_shows(coloured: Corpus, tmp_path: Path) -> None:
    summary = train(short_recipe(coloured, tmp_path / "run"))
    found = evaluate(tmp_path / "run", count=16, num_inference_steps=6)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == found
    assert found["checkpoint"] == Path(summary["checkpoint"]).name
    assert (found["count"], found["held_out_count"], found["images"]) == (16, 6, 36)
    untrained = found["untrained"]
    assert found["psnr"] > untrained["psnr"] + 3
    kid, before = found["metrics"]["kid-lite"], untrained["metrics"]["kid-lite"]
    assert kid["value"] + 3 * kid["error"] < before["value"] and kid["error"] > 0
    assert found["nearest_in_count"] >= 6 > 3 >= untrained["nearest_in_count"]
    assert 0 <= found["nearest_in_all"] <= found["nearest_in_count"]
    assert 0 <= found["held_out_nearest_in_count"] <= 6
    with Image.open(tmp_path / "run" / "grid.png") as sheet:
        assert sheet.width > 4 * 96
    other = evaluate(summary["checkpoint"], tmp_path / "other", count=16, num_inference_steps=6)
    assert other == found and (tmp_path / "other" / "grid.png").exists()


def test_without_a_hold_out_and_on_other_samples(coloured: Corpus, tmp_path: Path) -> None:
    recipe = short_recipe(coloured, tmp_path / "run", hold_out=0)
    stages = [recipe.stages[0].model_copy(update={"steps": 2})]
    train(recipe.model_copy(update={"stages": stages}))
    found = evaluate(tmp_path / "run", count=100, num_inference_steps=2)
    assert (found["count"], found["held_out_count"], found["held_out_nearest_in_count"]) == (36, 0, None)
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    stored = json.loads(state.read_text())
    stored["data"][-1]["digest"] = "0" * 16
    state.write_text(json.dumps(stored))
    with pytest.raises(RequestError, match="was trained on other samples"):
        evaluate(tmp_path / "run")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        evaluate(tmp_path / "nowhere")


def test_figures_of_known_pictures() -> None:
    rng = np.random.default_rng(0)
    images = {f"art/s/{i}": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(12)}
    some = dict(list(images.items())[4:8])
    real = {"trained": some, "held_out": {"art/s/9": images["art/s/9"]}}
    perfect = compare({kind: np.stack(list(r.values())) for kind, r in real.items()}, real, images)
    assert (perfect["nearest_in_count"], perfect["nearest_in_all"], perfect["held_out_nearest_in_count"]) == (4, 4, 1)
    assert perfect["psnr"] == pytest.approx(68.13, abs=0.01)
    # the picture of one is another one of the count, of one another one of all, two are right but for noise
    wrong = [images["art/s/5"], images["art/s/0"]]
    near = [np.clip(images[f"art/s/{i}"].astype(int) + rng.integers(-9, 10, (8, 8, 3)), 0, 255) for i in (6, 7)]
    found = compare({"trained": np.stack([*wrong, *near]).astype(np.uint8)}, {"trained": some}, images)
    assert found["nearest_in_all"] == 2 and found["nearest_in_count"] in (2, 3)
    assert found["held_out_psnr"] is None and found["psnr"] < perfect["psnr"]


def test_distances_are_exact() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (3, 5))
    expected = [[((x.astype(float) - y) ** 2).mean() for y in b] for x in a]
    np.testing.assert_array_equal(distances(a, list(b)), np.array(expected))
    assert torch.tensor(distances(a, list(a))).diagonal().eq(0).all()
