"""What the legs of a run say: averages, rates, lengths, resolutions."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from microdit.pipeline.base.errors import RequestError
from microdit.trainer import start
from microdit.trainer.objective import learning_rate
from microdit.trainer.recipe import LegRecipe
from microdit.trainer.run import Run
from microdit.trainer.train import train
from tests.trainer.conftest import MODEL, STAGE, losses, state, tensors


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


# -- lengths that a time budget changes ------------------------------------------------------------------------------
class Plan:
    """Stands for a time budget: the lengths of the legs after each step, where they change."""

    def __init__(self, run: Run, lengths: dict[int, list[int]]):
        self.run, self.lengths = run, lengths
        self.keep()

    def observe(self, images_per_second: float) -> None:
        pass

    def keep(self, *_) -> bool:
        progress, legs = self.run.progress, self.run.recipe.stages
        if progress.step not in self.lengths:
            return False
        progress.lengths = self.lengths[progress.step]
        progress.scale = sum(progress.lengths) / sum(leg.length for leg in legs)
        return True


def plan(monkeypatch, lengths: dict[int, list[int]]) -> None:
    original = Run.prepare

    def prepare(self) -> None:
        original(self)
        self.budget = Plan(self, lengths)

    monkeypatch.setattr(Run, "prepare", prepare)


def test_an_average_begins_however_short_its_leg_becomes(recipe, tmp_path, monkeypatch) -> None:
    plan(monkeypatch, {0: [6, 30], 7: [6, 2]})  # when the second leg has begun nearly all time is over
    stages = [STAGE | {"steps": 6}, STAGE | {"steps": 30, "ema_start": 15 * STAGE["batch"], "warmup": 15 * 16}]
    assert train(recipe(stages=stages, checkpoint_every=1, checkpoint_keep=9))["steps"] == 8
    found = [path.parent.name for path in sorted((tmp_path / "run").glob("checkpoints/*/ema.safetensors"))]
    assert found[-2:] == ["step-00000006", "step-00000008"]
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run" / "log.jsonl").open()]
    assert rates[-2:] == pytest.approx([1e-3 / 16, 1e-3])  # and the warm-up ends


def test_an_average_that_has_begun_stays_though_its_leg_becomes_longer(recipe, tmp_path, monkeypatch) -> None:
    plan(monkeypatch, {0: [4], 3: [20], 6: [7]})
    stages = [STAGE | {"steps": 20, "ema_start": 10 * STAGE["batch"]}]
    assert train(recipe(stages=stages, checkpoint_every=1, checkpoint_keep=9))["steps"] == 7
    found = [path.parent.name for path in sorted((tmp_path / "run").glob("checkpoints/*/ema.safetensors"))]
    assert found == [f"step-0000000{step}" for step in (3, 4, 5, 6, 7)]
    before, after = (tensors(tmp_path / "run", step, "ema") for step in (3, 4))
    weights = tensors(tmp_path / "run", 4)
    share = 1 - 0.5 ** (STAGE["batch"] / STAGE["ema_half_life"])
    for key in before:
        torch.testing.assert_close(after[key], before[key] + share * (weights[key] - before[key]))


# -- what a leg cannot be ----------------------------------------------------------------------------------------------
def test_experts_that_would_get_no_token_are_refused_and_the_advice_works(recipe) -> None:
    model, stages = MODEL | {"depth": 3, "num_experts": 4}, [STAGE | {"steps": 1, "mask_ratio": 0.5}]
    with pytest.raises(RequestError, match=r"stages\.0, latents/demo-32: each of the 4 experts gets none of 2 tokens"):
        train(recipe(model=model | {"expert_capacity": 1.0}, stages=stages))
    with pytest.raises(RequestError, match=r"raise expert_capacity to 2, lower num_experts or mask_ratio"):
        train(recipe(model=model | {"expert_capacity": 1.9}, stages=[STAGE | {"steps": 1}, *stages]))
    assert train(recipe(model=model | {"expert_capacity": 2.0}, stages=stages))["steps"] == 1


def test_a_run_that_began_with_idle_experts_goes_on(recipe, at_step, monkeypatch) -> None:
    model = MODEL | {"depth": 3, "num_experts": 4, "expert_capacity": 1.0}
    begun = recipe(model=model, stages=[STAGE | {"steps": 3, "mask_ratio": 0.5, "micro_batch": "auto"}])
    with monkeypatch.context() as patch:
        patch.setattr(start, "refuse_misfits", lambda *_: None)  # as earlier versions began
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(begun)["steps"] == 2
    assert train(begun)["steps"] == 3


def test_the_optimizer_is_reset_where_a_leg_says_so(recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 3}, STAGE | {"steps": 2, "reset_optimizer": True}, STAGE | {"steps": 2}]
    train(recipe(stages=stages, checkpoint_every=1, checkpoint_keep=9))
    counts = [tensors(tmp_path / "run", step, "optimizer")["final_layer.linear.weight.step"] for step in range(1, 8)]
    assert counts == [1, 2, 3, 1, 2, 3, 4]
    weights = tensors(tmp_path / "run", 4)
    kept = recipe(stages=[stages[0], STAGE | {"steps": 2}], out=str(tmp_path / "kept"), checkpoint_every=4)
    train(kept)
    assert not torch.equal(weights["t_embedder.mlp.0.weight"], tensors(tmp_path / "kept", 4)["t_embedder.mlp.0.weight"])
