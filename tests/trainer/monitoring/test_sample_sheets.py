import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from microdit.model.picture_files import grid
from microdit.model.text_to_image import MicroDiTPipeline
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli.command import torchrun
from microdit.pipeline.corpus.corpus import Corpus
from microdit.trainer.monitoring.sample_sheets import SAMPLER, SEED, STEPS
from microdit.trainer.recipe import Recipe
from microdit.trainer.train import train
from tests.trainer.conftest import NAMES, short_recipe, validations


def drawing_recipe(corpus: Corpus, out: Path, steps: int, **fields) -> Recipe:
    recipe = short_recipe(corpus, out, **fields)
    return recipe.model_copy(update={"stages": [recipe.stages[0].model_copy(update={"steps": steps})]})


def test_sheets_are_what_generate_draws(coloured: Corpus, tmp_path) -> None:
    prompts = ["red above blue", "pink above black"]
    run = tmp_path / "run"
    summary = train(drawing_recipe(coloured, run, 5, sample_every=2, sample_prompts=prompts))
    names = [f"step-0000000{step}.png" for step in (0, 2, 4, 5)]
    assert sorted(path.name for path in (run / "samples").iterdir()) == names
    pipe = MicroDiTPipeline.from_pretrained(summary["checkpoint"])
    pictures = pipe(prompts, num_inference_steps=STEPS, sampler=SAMPLER, seed=SEED).images
    with Image.open(run / "samples" / names[-1]) as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(grid([[p] for p in pictures], prompts)))
    told = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 9}).Reload()
    assert [image.step for image in told.Images("samples")] == [0, 2, 4, 5]


def test_what_is_held_out_is_drawn_by_two_processes_too(coloured: Corpus, tmp_path) -> None:
    recipe = drawing_recipe(
        coloured, tmp_path / "two", 2, sample_every=2, hold_out=5, validate_every=1, text_lengths=[32]
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    command = [*torchrun(2), "-m", "microdit.trainer", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train(recipe.model_copy(update={"out": tmp_path / "one"}))
    one, two = validations(tmp_path / "one"), validations(tmp_path / "two")
    assert list(two) == [0, 1, 2]
    for step, figures in two.items():
        assert figures.pop("samples") == 5  # one process has a row that is none
        for name in ("loss", "ema_loss") if step else ("loss",):
            assert figures[name] == pytest.approx(one[step][name], rel=1e-5)
    sheets = [np.asarray(Image.open(tmp_path / run / "samples" / "step-00000002.png")) for run in ("one", "two")]
    assert sheets[0].shape == sheets[1].shape and sheets[0].std() > 20
    assert np.abs(sheets[0].astype(int) - sheets[1]).mean() < 3


def test_models_that_cannot_be_had_are_seen_before_the_first_step(recipe, coloured: Corpus, tmp_path) -> None:
    with pytest.raises(RequestError, match=r"sample_every = 3: what draws pictures cannot be had: .*tiny"):
        train(recipe(sample_every=3, sample_prompts=["a cat"]))
    assert not (tmp_path / "run" / "log.jsonl").exists()
    with pytest.raises(ValueError, match="sample_every: there is nothing to draw"):
        recipe(sample_every=3)


def test_a_sheet_that_cannot_be_written_is_told_and_the_run_goes_on(coloured: Corpus, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "samples").write_text("in the way")
    assert train(drawing_recipe(coloured, run, 1, sample_every=1, sample_prompts=[*NAMES[:1]]))["steps"] == 1
    assert "step 0: no pictures, because" in capsys.readouterr().out
