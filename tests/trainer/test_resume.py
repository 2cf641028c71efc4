"""Runs that were killed, stopped or finished, and go on, with the same recipe or a changed one."""

import json
import os
import signal

import pytest
import torch

from microdit.pipeline.base.errors import RequestError
from microdit.trainer.__main__ import main
from microdit.trainer.objective import learning_rate
from microdit.trainer.run import Run
from microdit.trainer.train import train
from tests.trainer.conftest import STAGE, build_corpus, build_recipe, losses, state, tensors, validations


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [3, 6, 7, 10, 12])
def test_killed_and_run_again_gives_the_same_losses_bit_by_bit(recipe, at_step, tmp_path, monkeypatch, step) -> None:
    fields = {"hold_out": 6, "validate_every": 3}
    train(recipe(**fields, out=str(tmp_path / "whole")))

    def die() -> None:
        raise Killed

    with monkeypatch.context():
        at_step(step, die)
        with pytest.raises(Killed):
            train(recipe(**fields))
    monkeypatch.undo()
    (tmp_path / "run" / "log.jsonl").open("a").write('{"step": 9, "los')  # a kill may tear the last line
    summary = train(recipe(**fields))
    assert summary["steps"] == 12
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "run")) == 12
    assert list(validations(tmp_path / "run")) == [0, 3, 6, 9, 12]
    assert validations(tmp_path / "run") == validations(tmp_path / "whole")
    for name in ("model", "ema", "optimizer"):
        a, b = tensors(tmp_path / "run", 12, name), tensors(tmp_path / "whole", 12, name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on(recipe, at_step, tmp_path, monkeypatch, number) -> None:
    train(recipe(out=str(tmp_path / "whole"), log_every=4))
    before = signal.getsignal(number)
    at_step(6, lambda: os.kill(os.getpid(), number))
    summary = train(recipe(log_every=4))
    assert signal.getsignal(number) is before
    assert (summary["signal"], summary["steps"]) == (number, 6)
    assert state(tmp_path / "run", 6)["progress"]["stage_step"] == 1
    monkeypatch.undo()
    assert train(recipe(log_every=4))["signal"] == 0
    # the line of step 8 is a mean of steps before and after the stop
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_broken_shards_are_in_the_checkpoint_and_a_run_goes_on_with_them(at_step, tmp_path, monkeypatch) -> None:
    fields = {"lanes": 4, "max_broken": 0.3, "stages": [STAGE | {"steps": 12}], "checkpoint_every": 100}
    corpus = build_corpus(tmp_path / "corpus")
    corpus.store.delete([corpus.commits("latents/demo-32")[1].object.name])
    whole = build_recipe(corpus, tmp_path / "whole", **fields)
    assert train(whole)["steps"] == 12
    broken = state(tmp_path / "whole", 12)["broken"]
    assert len(broken) == 1 and broken[0][0] == "latents/demo-32"

    parted = build_recipe(corpus, tmp_path / "parted", **fields)
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(parted)["signal"] == signal.SIGTERM
    monkeypatch.undo()
    assert train(parted)["signal"] == 0
    assert losses(tmp_path / "parted") == losses(tmp_path / "whole")
    assert state(tmp_path / "parted", 12)["broken"] == broken

    few = build_recipe(corpus, tmp_path / "few", **{**fields, "max_broken": 0.1})
    with pytest.raises(RequestError, match=r"16 of 96 samples are broken, more than max_broken = 0\.1 allows"):
        train(few)


def test_a_finished_run_has_nothing_to_do(recipe, tmp_path, capsys) -> None:
    first = train(recipe())
    log = (tmp_path / "run" / "log.jsonl").read_text()
    capsys.readouterr()
    assert train(recipe()) == first
    assert (tmp_path / "run" / "log.jsonl").read_text() == log
    assert capsys.readouterr().out.count("\n") == 1


def test_a_run_that_shall_not_go_on_is_refused(yaml_recipe, tmp_path, capsys) -> None:
    path, first = str(yaml_recipe(stages=[STAGE | {"steps": 1}])), ["--resume", "never"]
    assert main([path, *first, "log_every=2"]) == 0
    assert main([path, "log_every=2", *first]) == 2
    assert f"there are checkpoints in {tmp_path / 'run' / 'checkpoints'}" in capsys.readouterr().err
    assert main([path, "--resume", "auto"]) == 0


def test_what_changes_only_rounding_is_changed_on_resume_and_long_captions_are_found_at_the_start(
    recipe, tmp_path, at_step
) -> None:
    with pytest.raises(RequestError, match=r"text_lengths: text/tiny@long has a caption of 21 .*the last length is 20"):
        train(recipe(text_lengths=[4, 20]))
    assert not (tmp_path / "run" / "log.jsonl").exists()
    train(recipe(out=str(tmp_path / "whole")))
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(recipe())
    stages = [stage.model_dump(exclude_none=True) | {"micro_batch": 3} for stage in recipe().stages]
    assert train(recipe(stages=stages, text_lengths=[8, 21], name="other"))["steps"] == 12
    whole, parted = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert list(parted.values()) == pytest.approx(list(whole.values()), rel=1e-5)


def test_a_finished_run_is_made_longer(recipe, tmp_path) -> None:
    stages = [stage.model_dump(exclude_none=True) for stage in recipe().stages]
    train(recipe())
    longer = [stages[0], stages[1] | {"steps": 10}]
    summary = train(recipe(stages=longer))
    assert summary["steps"] == 15 and list(losses(tmp_path / "run")) == list(range(1, 16))
    optimizer = tensors(tmp_path / "run", 15, "optimizer")
    assert optimizer["final_layer.linear.weight.step"] == 15
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run" / "log.jsonl").open()]
    assert rates[12:] == [learning_rate(recipe(stages=longer).stages[1], step, 10) for step in (7, 8, 9)]
    with pytest.raises(RequestError, match=r"stages\.1: 9 steps are fewer than the 10 that are done"):
        train(recipe(stages=[stages[0], stages[1] | {"steps": 9}]))


def test_another_recipe_or_other_samples_are_refused(recipe, tmp_path) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=3)
    own = {"of": corpus}
    train(recipe(**own))
    for fields, name in (({"seed": 4}, "seed"), ({"stages": [STAGE | {"steps": 2}]}, "stages")):
        with pytest.raises(RequestError, match=f"was made with {name} = .*put it back, or set out"):
            train(recipe(**own, **fields))
    train(recipe(**own, log_every=3, checkpoint_every=50, cache_mb=1))
    build_corpus(tmp_path / "c", units=2, shards=3)
    with pytest.raises(RequestError, match=r"made on 48 samples of latents/demo-32 .* now give 96"):
        train(recipe(**own))


@pytest.mark.parametrize("step", [5, 6, 7])
def test_a_run_that_resets_its_optimizer_goes_on_bit_by_bit(recipe, at_step, tmp_path, monkeypatch, step) -> None:
    fields = {"stages": [STAGE | {"steps": 5}, STAGE | {"steps": 4, "reset_optimizer": True}], "checkpoint_every": 1}
    train(recipe(**fields, out=str(tmp_path / "whole")))
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(recipe(**fields))["steps"] == step
    monkeypatch.undo()
    train(recipe(**fields))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name in ("model", "ema", "optimizer"):
        a, b = tensors(tmp_path / "run", 9, name), tensors(tmp_path / "whole", 9, name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_of_an_earlier_version_goes_on_in_its_order(recipe, at_step, tmp_path, monkeypatch) -> None:
    original = Run.resume

    def resume(self, allowed: bool) -> None:  # as earlier versions began
        original(self, allowed)
        self.progress.even_lanes = False
        for data in self.legs:
            data.lanes.even = False

    with monkeypatch.context() as patch:
        patch.setattr(Run, "resume", resume)
        train(recipe(out=str(tmp_path / "whole")))
        at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(recipe())["steps"] == 6
    monkeypatch.undo()
    path = tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json"
    saved = json.loads(path.read_text())
    assert saved["progress"].pop("even_lanes") is False
    del saved["sha256"]
    path.write_text(json.dumps(saved))
    train(recipe())
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert state(tmp_path / "run", 12)["progress"]["even_lanes"] is False
    train(recipe(out=str(tmp_path / "new")))
    assert losses(tmp_path / "new") != losses(tmp_path / "whole")
    assert state(tmp_path / "new", 12)["progress"]["even_lanes"] is True
