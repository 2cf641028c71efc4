"""`evaluate:` in a recipe: figures on the way, the best checkpoint, and nothing else changed."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from microdit.model.text_to_image import MicroDiTPipeline
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.evaluation import DISTANCES
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.evaluation import in_training
from microdit.pipeline.evaluation.corpus_pictures import read_images
from microdit.pipeline.evaluation.measured_arrays import ArrayMeter
from microdit.pipeline.evaluation.metrics import METRICS
from microdit.pipeline.selection.sample_index import read_captions
from microdit.trainer.data.samples import open_samples
from microdit.trainer.recipe import Recipe
from microdit.trainer.train import train
from tests.trainer.conftest import saved_steps, short_recipe, tensors

pytest.importorskip("efficientnet_lite_pytorch")


def evaluated(corpus: Corpus, out: Path, steps: int, **fields: Any) -> Recipe:
    """A metric of two pictures: the corpus has 36."""
    block = {"every": 2, "metrics": ["fid-lite"], "images": 5, "reference": 8, "steps": 2}
    recipe = short_recipe(corpus, out, **({"evaluate": block, "checkpoint_every": 100, "checkpoint_keep": 1} | fields))
    return recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update={"steps": steps})]})


def figures(out: Path) -> dict[int, Any]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["evaluation"]["fid-lite"] for line in lines if "evaluation" in line}


def test_figures_are_those_of_pictures_that_generate_draws(coloured: Corpus, tmp_path: Path) -> None:
    recipe = evaluated(coloured, tmp_path / "run", 5)
    summary = train(recipe)
    found = figures(tmp_path / "run")
    assert list(found) == [0, 2, 4, 5]
    told = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in told.Scalars("evaluation/fid-lite/value")]
    assert scalars == [(step, pytest.approx(one["value"], rel=1e-6)) for step, one in found.items()]
    samples = open_samples(recipe)
    prompts = read_captions(coloured, recipe.main_text, samples.held.take(samples.held.lowest(5, recipe.seed + 1)))
    real = read_images(coloured, samples.legs[-1].take(samples.legs[-1].lowest(8, recipe.seed + 1)), 32)
    pipe = MicroDiTPipeline.from_pretrained(summary["checkpoint"])
    pictures = pipe(prompts, num_inference_steps=2, sampler="unipc", seed=in_training.SEED).images
    meter = ArrayMeter(["fid-lite"], list(real.values()))
    expected = meter.measure([np.asarray(picture) for picture in pictures])["fid-lite"]
    assert found[5]["value"] == pytest.approx(expected["value"], rel=1e-3)


def test_the_best_checkpoint_stays_and_training_is_as_without(
    coloured: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(evaluated(coloured, tmp_path / "without", 6, evaluate=None))
    values = iter([5.0, 3.0, 1.0, 4.0])
    compare = ArrayMeter.compare
    monkeypatch.setattr(
        ArrayMeter, "compare", lambda *args: {"fid-lite": compare(*args)["fid-lite"] | {"value": next(values)}}
    )
    run = tmp_path / "run"
    train(evaluated(coloured, run, 6))
    assert [one["value"] for one in figures(run).values()] == [5.0, 3.0, 1.0, 4.0]
    assert saved_steps(run) == [4, 6]  # the best one, and the last one, as one is kept
    for name, value in tensors(tmp_path / "without", 6).items():
        assert torch.equal(value, tensors(run, 6)[name]), name


@pytest.mark.slow
def test_two_processes_and_a_stopped_run_give_the_same_figures(
    coloured: Corpus, tmp_path: Path, team: Callable[..., list[int]]
) -> None:
    train(evaluated(coloured, tmp_path / "one", 4))
    assert team(evaluated(coloured, tmp_path / "two", 4)) == [0, 0]
    stopped = evaluated(coloured, tmp_path / "stopped", 4)
    assert team(stopped, 1, at=(0, 3, signal.SIGTERM)) == [128 + signal.SIGTERM]
    assert train(stopped)["steps"] == 4
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert list(one) == [0, 2, 4] == list(two)
    assert figures(tmp_path / "stopped") == one
    for step, found in one.items():
        assert two[step]["value"] == pytest.approx(found["value"], rel=0.02), step


def test_names_of_metrics() -> None:
    assert tuple(METRICS) == DISTANCES


def test_wrong_requests(coloured: Corpus, tmp_path: Path) -> None:
    block = {"every": 2, "metrics": ["kid-lite"], "images": 5, "reference": 8}
    with pytest.raises(RequestError, match="evaluate: kid-lite takes at least 20 pictures and as many real ones"):
        train(evaluated(coloured, tmp_path / "run", 2, evaluate=block))
    with pytest.raises(ValueError, match="metric 'geneval' compares with no pictures"):
        evaluated(coloured, tmp_path / "run", 2, evaluate=block | {"metrics": ["geneval"]})
