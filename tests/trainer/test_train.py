import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch._dynamo.utils import counters

from microdit.model.checkpoint import load_model
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.trainer.__main__ import main
from microdit.trainer.data.batches import LegData
from microdit.trainer.objective import learning_rate
from microdit.trainer.recipe import LegRecipe
from microdit.trainer.run import Run
from microdit.trainer.start import largest_that_fits
from microdit.trainer.train import train
from tests.trainer.conftest import STAGE, build_corpus, build_recipe, validations


def losses(out: Path) -> dict[int, float]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def state(out: Path, step: int) -> dict:
    return json.loads((out / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def tensors(out: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def test_a_run_learns_logs_and_leaves_what_generation_needs(recipe, tmp_path) -> None:
    stage = STAGE | {"steps": 60, "learning_rate": 3e-3}
    summary = train(recipe(stages=[stage], log_every=10, checkpoint_every=100))
    assert summary["images"] == 960 and summary["steps"] == 60 and summary["skipped"] == 0 and summary["signal"] == 0
    found = losses(tmp_path / "run")
    assert list(found) == [10, 20, 30, 40, 50, 60]
    assert found[60] < 0.97 * found[10]
    folder = Path(summary["checkpoint"])
    net, ema = load_model(folder / "model.safetensors"), load_model(folder / "ema.safetensors")
    assert summary["parameters"] == sum(p.numel() for p in net.parameters())
    assert not torch.equal(net.final_layer.linear.weight, ema.final_layer.linear.weight)
    info = json.loads((folder / "generate.json").read_text())
    assert info["latent_shape"] == [4, 4, 4]
    assert info["latents"] == {"stage": "latents", "autoencoder": "demo", "resolution": 32}
    assert info["text"] == {"stage": "text", "encoder": "tiny"}
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


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


def test_micro_batches_change_nothing_but_rounding(recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 4, "mask_ratio": 0.5}]
    train(recipe(stages=stages, out=str(tmp_path / "a")))
    train(recipe(stages=[stages[0] | {"micro_batch": 6}], out=str(tmp_path / "b")))
    assert list(losses(tmp_path / "b").values()) == pytest.approx(list(losses(tmp_path / "a").values()), rel=1e-5)


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


def saved_steps(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").iterdir())


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


def test_a_disk_that_is_full_for_a_while_costs_no_line_of_the_log(recipe, tmp_path, monkeypatch, capfd) -> None:
    """The limit on a file's size stands for the disk."""
    limits, log = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run" / "log.jsonl"
    before, original = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), Run.report

    def report(self) -> None:
        full = 3 <= self.progress.step <= 9
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 100 if full else limits[0], limits[1]))
        original(self)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if full and self.progress.step > 3:
            assert list(losses(tmp_path / "run")) == [1, 2]  # no line is torn

    monkeypatch.setattr(Run, "report", report)
    try:
        assert train(recipe())["steps"] == 12
    finally:
        signal.signal(signal.SIGXFSZ, before)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(losses(tmp_path / "run")) == list(range(1, 13))
    said = capfd.readouterr()
    assert said.out.count("waits in memory until there is room") == 1 and said.out.count("is written again") == 1
    assert "Traceback" not in said.err
    assert tensorboard_steps(tmp_path / "run") == list(range(1, 13))


def tensorboard_steps(out: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return sorted({event.step for event in events.Scalars("loss")})


def test_a_second_run_in_one_folder_is_refused_while_the_first_lives(recipe, tmp_path, at_step, monkeypatch) -> None:
    def second() -> None:
        with pytest.raises(RequestError, match=r"another run works in .*/run \(process .*take another folder"):
            train(recipe())

    at_step(6, second)
    assert train(recipe())["steps"] == 12
    assert list(losses(tmp_path / "run")) == list(range(1, 13))


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


def test_the_log_tells_loss_by_noise_memory_and_time_left(recipe, tmp_path) -> None:
    train(recipe(log_every=4))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        found = [value for value in line["loss_by_noise"].values() if value is not None]
        assert len(line["loss_by_noise"]) == 6 and min(found) <= line["loss"] <= max(found)
        assert line["peak_memory_mb"] > 50 and line["mfu"] is None and 0 <= line["data_wait"] <= 1
    assert lines[-1]["seconds_left"] == 0 < lines[0]["seconds_left"]


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


def test_auto_is_the_largest_micro_batch_that_fits(recipe, tmp_path) -> None:
    tried = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > 12:
            raise torch.OutOfMemoryError("too much")

    assert largest_that_fits(50, attempt) == 7 and tried == [50, 25, 13, 7]
    with pytest.raises(RequestError, match="not even one image"):
        largest_that_fits(2, lambda size: attempt(size + 100))
    summary = train(recipe(stages=[STAGE | {"steps": 2, "micro_batch": "auto"}]))
    assert summary["steps"] == 2


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 3, "mask_ratio": 0.5}]
    text = {"text/tiny@source": 1.0}
    fields = {"stages": stages, "text": text, "text_lengths": [16], "hold_out": 5}
    train(recipe(**fields, out=str(tmp_path / "plain"), validate_every=1))
    torch._dynamo.reset()
    counters.clear()
    train(recipe(**fields | {"hold_out": 0}, out=str(tmp_path / "not-validated"), compile=True))
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    train(recipe(**fields, validate_every=1, compile=True))
    assert counters["stats"]["unique_graphs"] == graphs > 0  # nothing is compiled for the validation
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "run")
    assert list(compiled.values()) == pytest.approx(list(plain.values()), rel=1e-5)
    for step, figures in validations(tmp_path / "run").items():
        assert figures["loss"] == pytest.approx(validations(tmp_path / "plain")[step]["loss"], rel=1e-5)


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"dim": 30}}, "model: .*dim=30"),
        ({"model": {"dimension": 32}}, "model: .*dimension.*expected arguments of MicroDiT"),
        ({"model": {"preset": "huge"}}, "preset = 'huge': expected one of xl_2, tiny_2"),
        ({"model": {"in_channels": 16}}, "in_channels = 16: the columns say 4"),
        ({"corpus": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"text": {"text/other@source": 1.0}}, "text/other@source"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(recipe, fields, message) -> None:
    with pytest.raises(RequestError, match=message):
        train(recipe(**fields))


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


# -- as a command ----------------------------------------------------------------------------------------------------
def command(path: Path, *overrides: str, processes: int = 0) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    return [sys.executable, *torchrun, "-m", "microdit.trainer", str(path), *overrides]


@pytest.fixture
def yaml_recipe(recipe, tmp_path):
    def write(**fields) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(**fields).model_dump(mode="json", exclude_none=True)))
        return path

    return write


def test_two_processes_give_the_losses_of_one(recipe, yaml_recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 3, "mask_ratio": 0.5, "micro_batch": 5}, STAGE | {"steps": 2}]
    train(recipe(stages=stages, out=str(tmp_path / "one")))
    path = yaml_recipe(stages=stages)
    done = subprocess.run(command(path, processes=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert two.keys() == one.keys()
    # and one process goes on where two were
    done = subprocess.run(command(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finished: 80 of 80 images" in done.stdout


def test_sigkill_and_sigterm_of_the_real_command(recipe, yaml_recipe, tmp_path) -> None:
    stages = [STAGE | {"steps": 150}]
    path = yaml_recipe(stages=stages, checkpoint_every=5)
    whole = recipe(stages=stages, out=str(tmp_path / "whole"), checkpoint_every=1000)
    train(whole)

    def run_until(step: int, number: int) -> int:
        process = subprocess.Popen(command(path), stdout=subprocess.DEVNULL)
        log = tmp_path / "run" / "log.jsonl"
        while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= step):
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait()

    assert run_until(12, signal.SIGKILL) == -signal.SIGKILL
    assert run_until(40, signal.SIGTERM) == 143
    done = subprocess.run(command(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stdout
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_wrong_request_ends_with_status_2_and_one_message(yaml_recipe) -> None:
    done = subprocess.run(command(yaml_recipe(), "corpus=/nowhere"), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "corpus /nowhere: there is no corpus.json" in done.stderr


def test_the_corpus_is_only_read(corpus: Corpus, recipe) -> None:
    def listing() -> list[str]:
        return sorted(item.name for item in corpus.store.list())

    before = listing()
    train(recipe())
    assert listing() == before
