"""What the legs of a run say: averages, rates, lengths, resolutions."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from microdit.trainer.objective import learning_rate
from microdit.trainer.recipe import LegRecipe
from microdit.trainer.train import train
from tests.trainer.conftest import STAGE, losses, state, tensors


def test_several_averages_and_one_that_starts_late(recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 4, "ema_half_life": [200, 20], "ema_start": 32}]
    train(recipe(stages=stages, checkpoint_every=1, checkpoint_keep=9))
    folder = tmp_path / "run" / "checkpoints"
    assert [(folder / f"step-0000000{n}" / "ema.safetensors").exists() for n in (1, 2, 3, 4)] == [False] * 2 + [
        True
    ] * 2
    weights = tensors(tmp_path / "run", 4)
    for name, half_life in (("ema", 200), ("ema-2", 20)):
        before, after = tensors(tmp_path / "run", 3, name), tensors(tmp_path / "run", 4, name)
        for key in before:
            expected = before[key] + (1 - 0.5 ** (16 / half_life)) * (weights[key] - before[key])
            torch.testing.assert_close(after[key], expected)


def test_stages_may_differ_in_resolution_and_moving_average(recipe, tmp_path) -> None:
    stages = [
        STAGE | {"steps": 3, "ema_half_life": None},
        STAGE | {"steps": 3, "latents": "latents/demo-64", "batch": 8, "mask_ratio": 0.75},
    ]
    summary = train(recipe(stages=stages, checkpoint_every=1, checkpoint_keep=9))
    assert summary["images"] == 3 * 16 + 3 * 8
    assert not (tmp_path / "run" / "checkpoints" / "step-00000002" / "ema.safetensors").exists()
    weights, ema = tensors(tmp_path / "run", 4), tensors(tmp_path / "run", 4, "ema")
    assert all(torch.equal(weights[key], ema[key]) for key in weights)  # it begins with the weights of its first step
    share, before, now = 1 - 0.5 ** (8 / 200), ema, tensors(tmp_path / "run", 5)
    after = tensors(tmp_path / "run", 5, "ema")
    for key in before:
        torch.testing.assert_close(after[key], before[key] + share * (now[key] - before[key]))
    assert json.loads(Path(summary["checkpoint"], "generate.json").read_text())["latent_shape"] == [4, 8, 8]


def test_time_budget_shortens_all_stages(recipe, tmp_path, at_step, monkeypatch, capsys) -> None:
    stages = [STAGE | {"images": 400_000, "mask_ratio": 0.5, "warmup": 80_000}, STAGE | {"images": 1_200_000}]
    budget = recipe(stages=stages, time_budget=8, log_every=20, checkpoint_every=10_000)
    # 2 x 11 steps measure the speed
    at_step(30, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = train(budget)
    assert "time budget: on this machine there is time for" in capsys.readouterr().out
    lengths = state(tmp_path / "run", stopped["steps"])["progress"]["lengths"]
    assert stopped["steps"] == 8 and 0 < stopped["scale"] < 0.5
    assert lengths[1] == pytest.approx(3 * lengths[0], rel=0.1)
    monkeypatch.undo()
    # without a budget it goes on with the lengths that it has, with another one they change
    ended = train(budget.model_copy(update={"time_budget": 4}))
    assert 8 < ended["steps"] < sum(stage["images"] for stage in stages) / STAGE["batch"]
    assert ended["images"] == ended["steps"] * STAGE["batch"]


def test_time_budget_that_is_enough_changes_nothing(recipe, tmp_path) -> None:
    summary = train(recipe(time_budget=1000))
    assert summary["scale"] == 1 and summary["steps"] == 12
    train(recipe(out=str(tmp_path / "other")))
    assert losses(tmp_path / "run") == losses(tmp_path / "other")


def test_learning_rate() -> None:
    stage = LegRecipe(
        latents="l", steps=100, batch=10, warmup=100, learning_rate=1.0, schedule="cosine", final_learning_rate=0.1
    )
    rates = [learning_rate(stage, step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11) and rates[10] == 1
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    linear = stage.model_copy(update={"schedule": "linear", "warmup": 0})
    assert [learning_rate(linear, step, 10) for step in (0, 5, 10)] == pytest.approx([1, 0.55, 0.1])
    constant = stage.model_copy(update={"schedule": "constant"})
    assert [learning_rate(constant, step, 60, scale=0.5) for step in (4, 5, 59)] == pytest.approx([5 / 6, 1, 1])
