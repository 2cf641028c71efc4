"""From prompts to a trained model without any data set: configs/synthetic-only.yaml and its recipe, small, on a CPU."""

import json
import math
from pathlib import Path

from typer.testing import CliRunner

from microdit.pipeline.cli.app import app
from microdit.pipeline.config.build import load_config
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.curation.duplicates import dedup
from microdit.pipeline.selection.selections import select
from microdit.pipeline.selection.view import query
from microdit.pipeline.upkeep.verify import verify
from microdit.trainer.recipe import load_recipe
from microdit.trainer.train import train
from tests.miniatures.built import build
from tests.pipeline.helpers.tiny_pipelines import save_pipeline

PROMPTS = Path(__file__).parent / "data" / "synthesis" / "prompts.tsv"
COLUMNS = {
    "captions/source": {},
    "scores/basic": {},
    "latents/demo-64": {"autoencoder": "demo", "resolution": 64},
    "text/minilm@source": {"encoder": "minilm"},
}


def corpus_of(folder: Path) -> Corpus:
    """Build the shipped config with two tiny pipelines of random weights, and columns of the demo's models."""
    maker = {"steps": 2, "size": 64, "dtype": "float32", "batch": 4}
    makers = [
        {"model": str(save_pipeline("sd", folder / "sd")), "name": "sd", "weight": 2, **maker},
        {"model": str(save_pipeline("z-image", folder / "z-image")), "name": "z-image", **maker},
    ]
    overrides = [
        f"sources.drawn.prompts.path={PROMPTS}",
        f"sources.drawn.makers={json.dumps(makers)}",
        "sources.drawn.images_per_prompt=3",
        "sources.drawn.prompts_per_unit=8",
        f"columns={json.dumps(COLUMNS)}",
        "images.min_side=64",
        "images.max_side=64",
        "shard_samples=8",
        f"resources.scratch={folder / 'scratch'}",
    ]
    corpus, told = build(load_config("configs/synthetic-only.yaml", overrides, str(folder / "corpus")))
    assert any("sd: " in line and "z-image: " in line for line in told)  # the licences, first of all
    return corpus


def test_from_prompts_to_a_trained_model(tmp_path: Path):
    corpus = corpus_of(tmp_path)
    counts = {column: sum(commit.counts["out"] for commit in corpus.commits(column)) for column in (IMAGES, *COLUMNS)}
    assert counts == dict.fromkeys((IMAGES, *COLUMNS), 36)  # of 12 prompts: one came twice
    assert verify(corpus).problems == []
    by_maker = query(corpus, "SELECT fields ->> 'maker' AS maker, count(*) AS n FROM samples GROUP BY maker")
    assert set(by_maker["maker"].to_pylist()) == {"sd", "z-image"}
    [rows] = query(corpus, "SELECT count(DISTINCT fields ->> 'prompt_row') AS n FROM samples")["n"].to_pylist()
    assert rows == 12

    dedup(corpus, 0)
    kept = select(corpus, "drawn").rows
    assert 12 <= kept <= 36
    recipe = load_recipe(
        "configs/recipes/synthetic-only.yaml",
        [
            f"corpus={corpus.url}",
            f"out={tmp_path / 'run'}",
            "text={text/minilm@source: 1.0}",
            "model={preset: tiny_2, dim: 64, depth: 2, patch_mixer_dim: 64, patch_mixer_depth: 1, multiple_of: 32}",
            "hold_out=4",
            "lanes=2",
            "precision=fp32",
            "sample_every=null",
            *(f"stages.{n}.{name}" for n in range(4)
              for name in ("latents=latents/demo-64", "images=8", "batch=4", "warmup=0")),
        ],
    )  # fmt: skip
    summary = train(recipe)
    assert summary["steps"] == 8 and math.isfinite(summary["loss"])
    asked = ["--prompt", "a red apple", "--steps", "2", "--out", str(tmp_path / "pictures")]
    found = CliRunner().invoke(app, ["generate", "--checkpoint", str(summary["checkpoint"]), *asked])
    assert found.exit_code == 0, (found.output, found.exception)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
