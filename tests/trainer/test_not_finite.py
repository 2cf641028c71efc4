"""Gradients, weights and samples that are not finite."""

import json
import math
import os
import signal

import pytest
import torch

from microdit.pipeline.base.errors import RequestError
from microdit.trainer.__main__ import main
from microdit.trainer.data.batches import LegData
from microdit.trainer.run import Run
from microdit.trainer.train import train
from tests.trainer.conftest import STAGE, losses, saved_steps, state, tensors


@pytest.fixture
def spoiled(monkeypatch):
    """Make the gradients of some steps not finite, counted from 0."""
    original = LegData._batch

    def spoil(steps) -> None:
        def batch(self, step, seen):
            made = original(self, step, seen)
            if step in steps:
                made.micro_batches[0].noise[0] = math.nan
            return made

        monkeypatch.setattr(LegData, "_batch", batch)

    return spoil


def test_steps_with_a_gradient_that_is_not_finite_are_skipped_and_counted(recipe, tmp_path, spoiled) -> None:
    spoiled((2, 7))
    summary = train(recipe(log_every=2, checkpoint_every=1, checkpoint_keep=20))
    assert summary["skipped"] == 2
    assert saved_steps(tmp_path / "run") == [1, 2, 4, 5, 6, 7, 9, 10, 11, 12]  # after bad ones there is nothing new
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())
    before, after = tensors(tmp_path / "run", 2, "optimizer"), tensors(tmp_path / "run", 4, "optimizer")
    name = "final_layer.linear.weight"
    assert after[f"{name}.step"] == before[f"{name}.step"] + 1
    assert not torch.equal(tensors(tmp_path / "run", 4)[name], tensors(tmp_path / "run", 2)[name])
    assert all(value.isfinite().all() for value in tensors(tmp_path / "run", 12).values())


def test_a_run_that_learns_nothing_any_more_ends_and_goes_on_with_another_rate(
    recipe, tmp_path, spoiled, monkeypatch, capsys
) -> None:
    train(recipe(out=str(tmp_path / "whole"), checkpoint_every=6, checkpoint_keep=9))
    fields = {"log_every": 100, "checkpoint_every": 3, "checkpoint_keep": 1}
    spoiled(range(6, 12))
    with pytest.raises(RequestError, match=r"step 9: the last 3 .*step-00000006 is from before\. Lower learning_rate"):
        train(recipe(**fields))
    # three bad ones in a row, of which the last would have been saved; what is saved is the state before them
    assert saved_steps(tmp_path / "run") == [6]
    for name in ("model", "ema", "optimizer"):
        before, after = tensors(tmp_path / "whole", 6, name), tensors(tmp_path / "run", 6, name)
        assert all(torch.equal(before[key], after[key]) for key in before), name
    lines = [json.loads(line) for line in (tmp_path / "run" / "not-finite-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 8, 9]
    assert all(len(line["samples"]) == STAGE["batch"] and "art/art-00000" in line["samples"][0] for line in lines)
    for _ in range(2):  # again and again: nothing is lost
        with pytest.raises(RequestError, match="step 9: the last 3"):
            train(recipe(**fields))
    assert saved_steps(tmp_path / "run") == [6]

    monkeypatch.undo()
    stages = [stage.model_dump(exclude_none=True) for stage in recipe().stages]
    with pytest.raises(RequestError, match=r"made with stages\.0\.learning_rate = 0\.001, the recipe says 0\.0005"):
        train(recipe(**fields, stages=[stages[0] | {"learning_rate": 5e-4}, stages[1]]))
    stages[1] |= {"learning_rate": 5e-4, "clip": 0.1}
    capsys.readouterr()
    assert train(recipe(**fields, stages=stages, optimizer={"weight_decay": 0.2}))["skipped"] == 0
    assert "going on with stages.1.learning_rate = 0.0005, which was 0.001" in capsys.readouterr().out
    changes = state(tmp_path / "run", 12)["changes"]
    assert [(one["step"], one["name"], one["from"], one["to"]) for one in changes] == [
        (6, "optimizer.weight_decay", 0.1, 0.2),
        (6, "stages.1.learning_rate", 1e-3, 5e-4),
        (6, "stages.1.clip", None, 0.1),
    ]


def test_the_state_before_bad_steps_is_saved_where_none_was_and_the_one_before_it_stays(recipe, tmp_path, spoiled):
    train(recipe(out=str(tmp_path / "whole"), checkpoint_every=7, checkpoint_keep=9))
    spoiled(range(7, 10))
    with pytest.raises(RequestError, match="step 10: the last 3"):
        train(recipe(checkpoint_every=5, checkpoint_keep=1))
    assert saved_steps(tmp_path / "run") == [5, 7]
    found = state(tmp_path / "run", 7)["progress"]
    assert (found["step"], found["stage_step"], found["seen"], found["skipped"]) == (7, 2, 112, 0)
    for name in ("model", "ema", "optimizer"):
        before, after = tensors(tmp_path / "whole", 7, name), tensors(tmp_path / "run", 7, name)
        assert all(torch.equal(before[key], after[key]) for key in before), name


@pytest.mark.parametrize("bad", [(11,), (10, 11)])
def test_a_run_that_ends_on_bad_steps_has_not_finished(yaml_recipe, tmp_path, spoiled, capsys, bad) -> None:
    spoiled(bad)
    path = str(yaml_recipe())
    for _ in range(2):
        assert main([path]) == 2
        assert f"step 12: the last {len(bad)} gradients were not finite" in capsys.readouterr().err
    assert saved_steps(tmp_path / "run")[-1] == min(bad)


def test_bad_steps_are_counted_over_a_stop(recipe, tmp_path, spoiled, at_step, monkeypatch) -> None:
    spoiled(range(5, 12))
    with monkeypatch.context():
        at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(recipe())["signal"] == signal.SIGTERM
    assert saved_steps(tmp_path / "run") == [4, 5]
    monkeypatch.undo()
    spoiled(range(5, 12))
    with pytest.raises(RequestError, match="step 8: the last 3"):
        train(recipe())
    assert saved_steps(tmp_path / "run") == [4, 5]


def test_weights_that_are_not_finite_are_not_saved(recipe, tmp_path, at_step, monkeypatch) -> None:
    saved = []

    def spoil() -> None:
        with torch.no_grad():
            saved[0].learner.net.final_layer.linear.bias.fill_(math.inf)

    original = Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda self, *args: (saved.append(self), original(self, *args))[1])
    monkeypatch.setattr(Run, "step", lambda self, batch, real=Run.step: (real(self, batch), spoil())[0])
    with pytest.raises(RequestError, match=r"step 1: the weights are not finite and are not saved; there is no"):
        train(recipe(checkpoint_every=1))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_step_in_which_nothing_was_learned_is_null_in_the_log(recipe, tmp_path, spoiled, capsys) -> None:
    spoiled((2, 3))
    train(recipe())

    def refuse(name: str) -> None:
        pytest.fail(name)

    text = (tmp_path / "run" / "log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 4]
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [3, 4]
    json.dumps(state(tmp_path / "run", 12), allow_nan=False)
