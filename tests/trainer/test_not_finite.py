"""Gradients, weights and samples that are not finite."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.trainer.__main__ import main
from microdit.trainer.data.batches import LegData
from microdit.trainer.run import Run
from microdit.trainer.train import train
from tests.trainer.conftest import (
    STAGE,
    build_corpus,
    build_recipe,
    losses,
    saved_steps,
    state,
    tensors,
    validations,
)


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


# -- samples -----------------------------------------------------------------------------------------------------------
def corpus_with(root: Path, latents: dict[int, float], text: dict[int, float], rows: int = 16) -> Corpus:
    """A corpus of one shard; of these rows one number of the latents, or of the text, is another one."""
    corpus = build_corpus(root, units=1, shards=1)
    corpus.declare_column("latents/spoilt-32", {"stage": "latents", "autoencoder": "demo", "resolution": 32})
    corpus.declare_column("text/spoilt@source", {"stage": "text", "encoder": "tiny"}, {"tokens": "int32"})
    rng = np.random.default_rng(0)
    (images,), (captions,) = corpus.commits("images"), corpus.commits("captions/source")
    for column, made_from, shape, spoilt in (
        ("latents/spoilt-32", images, (4, 4, 4), latents), ("text/spoilt@source", captions, (3, 16), text)
    ):  # fmt: skip
        with begin_attempt(corpus, column, images.ref, [made_from]) as attempt:
            for row in range(rows):
                array = rng.normal(size=shape).astype(np.float16)
                array.flat[7] = spoilt.get(row, 0)
                attempt.add(row, f"k0-{row}", {"npy": array_bytes(array)}, **({"tokens": 3} if len(shape) == 2 else {}))
            for row in range(rows, 16):
                attempt.fail(row, f"k0-{row}", "not_an_image")
            attempt.commit()
    return corpus


SPOILT = {"text": {"text/spoilt@source": 1.0}, "caption_dropout": 0.0, "max_broken": 0.2}


@pytest.mark.parametrize("rows", [16, 11])  # of eight lanes some have but one of 11 samples
def test_samples_that_are_not_finite_are_replaced_and_counted(tmp_path, capsys, rows) -> None:
    corpus = corpus_with(tmp_path / "c", {5: math.nan}, {9: -math.inf}, rows)
    stages = [STAGE | {"latents": "latents/spoilt-32", "steps": 6}]
    recipe = build_recipe(corpus, tmp_path / "run", stages=stages, **SPOILT)
    assert train(recipe)["skipped"] == 0
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())
    assert state(tmp_path / "run", 6)["broken"] == [
        [
            "latents/spoilt-32",
            "art",
            "art-000000-00",
            5,
            "key k0-5: its numbers in latents/spoilt-32 are not all finite",
        ],
        [
            "text/spoilt@source",
            "art",
            "art-000000-00",
            9,
            "key k0-9: its numbers in text/spoilt@source are not all finite",
        ],
    ]
    assert (
        capsys.readouterr().err.count("broken, and replaced: column latents/spoilt-32, shard art-000000-00, row 5") == 1
    )
    assert not (tmp_path / "run" / "not-finite-0.jsonl").exists()


def test_too_many_samples_that_are_not_finite_end_the_run(tmp_path) -> None:
    corpus = corpus_with(tmp_path / "c", dict.fromkeys(range(4), math.inf), {})
    stages = [STAGE | {"latents": "latents/spoilt-32", "steps": 6}]
    recipe = build_recipe(corpus, tmp_path / "run", stages=stages, **SPOILT)
    with pytest.raises(RequestError, match=r"4 of 16 samples are broken, more than max_broken = 0\.2 .*key k0-\d: its"):
        train(recipe)


def test_held_out_samples_that_are_not_finite_are_left_out(tmp_path, capsys) -> None:
    corpus = corpus_with(tmp_path / "c", {}, dict.fromkeys(range(16), math.nan) | {3: 0.0, 4: 0.0, 5: 0.0})
    fields = SPOILT | {"stages": [STAGE | {"latents": "latents/spoilt-32", "steps": 1}], "max_broken": 0.99}
    train(build_recipe(corpus, tmp_path / "run", hold_out=8, validate_every=1, **fields))
    figures = validations(tmp_path / "run")[1]
    assert figures["left_out"] >= 5 and figures["samples"] == 8 - figures["left_out"]
    assert "held-out samples cannot be read, and are left out" in capsys.readouterr().out
