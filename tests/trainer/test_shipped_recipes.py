"""The recipes of the project: what they say, and that the small ones run."""

import functools
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from microdit.model.checkpoint import load_model
from microdit.model.network import MicroDiT
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import load_config
from microdit.pipeline.corpus.arrays import array_bytes
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.selection.selections import select
from microdit.trainer.data.samples import open_samples
from microdit.trainer.recipe import load_recipe
from microdit.trainer.start import Init
from microdit.trainer.train import train
from tests.servers.hub import Hub
from tests.trainer.conftest import MODEL, STAGE, build_corpus, build_recipe

# the paper's, by step: steps, mask, rate, last rate, warm-up, clip, P_mean, P_std, decay, start of the average
TABLE = [
    (250_000, 0.75, 2.4e-4, 0.8e-4, 2_500, 0.25, -0.6, 1.2, None, 0),
    (30_000, 0.0, 8e-5, 8e-5, 0, 0.25, -0.6, 1.2, None, 0),
    (50_000, 0.75, 8e-5, 8e-5, 500, 0.5, 0.0, 0.6, 0.99975, 25_000),
    (5_000, 0.0, 8e-5, 8e-5, 0, 0.5, 0.0, 0.6, 0.9975, 1_000),
]

CORPORA = {"sdxl": "microdit-37m", "ostris": "microdit-37m-ostris", "synthetic": "microdit-synthetic"}


@pytest.mark.parametrize("name", list(CORPORA))
def test_the_papers_recipes_are_the_papers(name: str) -> None:
    recipe, corpus = load_recipe(f"configs/recipes/paper-{name}.yaml"), load_config(f"configs/{CORPORA[name]}.yaml")
    found = []
    for stage in recipe.stages:
        assert stage.batch == 2048
        decay = round(0.5 ** (2048 / stage.half_lives[0]), 7) if stage.half_lives else None
        last = stage.final_learning_rate if stage.schedule == "cosine" else stage.learning_rate
        found.append(
            (stage.length, stage.mask_ratio, stage.learning_rate, last, stage.warmup / 2048, stage.clip, stage.p_mean,
             stage.p_std, decay, stage.ema_start / 2048)
        )  # fmt: skip
        assert stage.latents in corpus.columns
    assert found == TABLE
    assert [corpus.columns[stage.latents].resolution for stage in recipe.stages] == [256, 256, 512, 512]  # type: ignore[union-attr]
    assert [stage.reset_optimizer for stage in recipe.stages] == [False, False, True, False]
    assert [stage.selection is None for stage in recipe.stages] == [True, True, False, False]
    assert recipe.model == {"preset": "xl_2"} and set(recipe.text) <= set(corpus.columns)
    options = recipe.optimizer
    assert (options.betas, options.eps, options.weight_decay, options.expert_rate) == ((0.9, 0.999), 1e-8, 0.1, 1.0)
    assert recipe.caption_dropout == 0.1 and recipe.sigma_data == 0.9 and recipe.precision == "bf16"


def test_a_network_built_for_256_px_sees_512_px_as_one_built_for_it() -> None:
    torch.manual_seed(0)
    small, large = (MicroDiT(input_size=size, pos_interp_scale=scale, caption_channels=16, **MODEL)
                    for size, scale in ((4, 1.0), (8, 2.0)))  # fmt: skip
    assert torch.equal(small._pos_embed(4, 4, None), large.pos_embed)


def test_a_stage_may_have_a_selection_of_its_own(recipe, corpus: Corpus) -> None:
    select(corpus, "half", "SELECT source, shard, row FROM samples WHERE status = 'ok' AND row < 8")
    stages = [STAGE | {"steps": 2}, STAGE | {"steps": 2, "selection": "half"}]
    found = open_samples(recipe(stages=stages, hold_out=5))
    rows = [index.row for index in found.legs]
    assert rows[0].max() > 8 > rows[1].max() and len(rows[1]) > 20 and len(found.held) == 5
    held = {found.held.name(i) for i in range(5)}
    assert all(found.legs[s].name(i) not in held for s in (0, 1) for i in range(len(found.legs[s])))
    assert train(recipe(stages=stages, hold_out=5))["steps"] == 4
    with pytest.raises(RequestError, match="nowhere"):
        open_samples(recipe(stages=[STAGE | {"steps": 2, "selection": "nowhere"}]))


def test_a_run_tells_its_selections_and_that_the_corpus_has_changed(recipe, tmp_path, capsys) -> None:
    corpus = build_corpus(tmp_path / "c", units=1, shards=2)
    half = "SELECT source, shard, row FROM samples WHERE row < 8 AND caption_source_tokens = 3"
    chosen = (select(corpus, "half", half), select(corpus, "later", f"{half} AND row > 1"))
    names = [f"{found.name}@{found.hash}" for found in chosen]
    columns = {"stages": [STAGE | {"steps": 1}, STAGE | {"steps": 1, "selection": "later"}], "selection": "half"}
    own = {"of": corpus} | columns
    folder = Path(train(recipe(**own))["checkpoint"])
    assert [facts["selection"] for facts in json.loads((folder / "state.json").read_text())["data"]] == names
    assert json.loads((folder / "generate.json").read_text())["selection"] == names[1]
    assert "changed" not in capsys.readouterr().out

    build_corpus(tmp_path / "c", units=2, shards=2)  # more came in
    assert train(recipe(**own))["steps"] == 2, "the same rows are still there"
    train(recipe(**own, out=str(tmp_path / "again")))
    told = capsys.readouterr().out
    assert f"{names[0]} was chosen before captions/source, images changed: its rows are taken as they are" in told
    select(corpus, "half", half)
    with pytest.raises(RequestError, match=r"selection 'half'.*there are several of that name.*half@.*, half@"):
        train(recipe(**own))
    train(recipe(**{"of": corpus, "out": str(tmp_path / "named")} | columns | {"selection": names[0]}))
    folder = Path(train(build_recipe(corpus, tmp_path / "all", stages=[STAGE | {"steps": 1}]))["checkpoint"])
    assert json.loads((folder / "state.json").read_text())["data"][0]["selection"] is None


# -- runs ------------------------------------------------------------------------------------------------------------
RELEASED = "dit_4_channel_37M_real_and_synthetic_data.pt"

SMALL = {"input_size": 64, "pos_interp_scale": 2.0, "caption_channels": 12} | MODEL | {"dim": 512, "head_dim": 32,
         "depth": 16, "patch_mixer_dim": 64, "qkv_multipliers": [0.125], "ffn_multipliers": [0.125]}  # fmt: skip


def write_corpus(root, columns: dict[str, tuple[dict, tuple[int, ...]]], rows: int = 64) -> Corpus:
    """Columns by name: what they declare, and the shape of every sample's array."""
    corpus = Corpus.create(root, "own", rows)
    corpus.declare_source("art", {"adapter": "made-up"})
    rng = np.random.default_rng(0)
    for name, (stage, shape) in columns.items():
        corpus.declare_column(name, stage)
        with begin_attempt(
            corpus, name, ShardRef(source="art", unit="art-000000", shard="art-000000-00"), []
        ) as attempt:
            for row in range(rows):
                attempt.add(row, f"k{row}", {"npy": array_bytes(rng.normal(size=shape).astype(np.float16))})
            attempt.commit()
    return corpus


def text_column(encoder: str = "dfn-clip-h", model: dict | None = None, **stage) -> tuple[dict, tuple[int, ...]]:
    return {"stage": "text", "encoder": encoder, "model": model or {}} | stage, (77, 12)


@functools.cache
def released_file() -> bytes:
    torch.manual_seed(1)
    net = MicroDiT(**SMALL)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.05)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return buffer.getvalue()


@pytest.fixture
def released(hub: Hub) -> Hub:
    """The hub with a small network under the name of a released one, as a torch file."""
    hub.add("VSehwag24/MicroDiT", {f"ckpts/{RELEASED}": released_file()})
    return hub


def finetune(tmp_path, text: tuple[dict, tuple[int, ...]], *overrides: str, autoencoder: str = "sdxl"):
    latents = {"stage": "latents", "autoencoder": autoencoder, "resolution": 512}
    corpus = write_corpus(
        tmp_path / "corpus", {"latents/sdxl-512": (latents, (4, 64, 64)), "text/dfn-clip-h@source": text}, rows=8
    )
    few = ["lanes=2", "stages.0.batch=2", "stages.0.images=4", "log_every=1", "precision=fp32"]
    few += ["hold_out=0", "sample_every=null"]
    return load_recipe(
        "configs/recipes/finetune-released.yaml", [f"corpus={corpus.url}", f"out={tmp_path}/run", *few, *overrides]
    )


def test_finetuning_starts_from_the_released_weights(released, tmp_path, monkeypatch) -> None:
    recipe = finetune(tmp_path, text_column(), "stages.0.learning_rate=1e-8")
    summary = train(recipe)
    assert summary["steps"] == 2 and math.isfinite(summary["loss"])
    before = torch.load(io.BytesIO(released_file()), weights_only=True)
    after = load_model(f"{summary['checkpoint']}/model.safetensors")
    assert after.config["pos_interp_scale"] == 2.0 and after.config["input_size"] == 64
    for name, value in after.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    monkeypatch.setattr(Init, "load", None)
    assert train(recipe)["steps"] == 2  # and what it wrote is gone on with, without those weights


@pytest.mark.parametrize(
    ("text", "autoencoder", "overrides", "message"),
    [
        (text_column(model={"trim": True}), "sdxl", [], "source is trimmed, the weights were trained on the padding"),
        (text_column(storage="int8", group=64), "sdxl", [], "is stored as int8, the weights were trained on float16"),
        (text_column("t5-xxl"), "sdxl", [], "is of encoder t5-xxl, the weights are of dfn-clip-h"),
        (text_column(), "ostris", [], "is of autoencoder ostris, the weights are of sdxl"),
        (text_column(), "sdxl", ["model.preset=xl_2"], "model: leave it out"),
        (text_column(), "sdxl", ["init=dit_5.pt"], "init = dit_5.pt: .*released are"),
        (text_column(), "sdxl", ["sigma_data=0.5"], "sigma_data is 0.5"),
    ],
)
def test_finetuning_on_other_columns_is_refused(released, tmp_path, text, autoencoder, overrides, message) -> None:
    with pytest.raises(RequestError, match=message) as error:
        train(finetune(tmp_path, text, *overrides, autoencoder=autoencoder))
    assert "\n" not in str(error.value)


def test_tiny_runs_on_a_corpus_as_the_demos(tmp_path) -> None:
    latents = {"stage": "latents", "autoencoder": "demo", "resolution": 128}
    text = {f"text/minilm@{name}": ({"stage": "text", "encoder": "minilm"}, (5, 16)) for name in ("source", "long")}
    corpus = write_corpus(tmp_path / "corpus", {"latents/demo-128": (latents, (4, 16, 16)), **text}, rows=96)
    small = ["model.depth=2", "model.patch_mixer_depth=1", "stages.0.images=128", "stages.1.images=64"]
    small += ["hold_out=16", "sample_every=null"]  # the text is of no encoder
    recipe = load_recipe("configs/recipes/tiny.yaml", [f"corpus={corpus.url}", f"out={tmp_path}/run", *small])
    summary = train(recipe)
    assert summary["steps"] == 3 and math.isfinite(summary["loss"]) and summary["parameters"] > 2e7
