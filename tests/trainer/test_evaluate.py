import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.autoencoder import load_autoencoder
from model.checkpoint import CheckpointError
from model.text import load_text_encoder
from pipeline.corpus import Corpus, ShardRef
from pipeline.errors import RequestError
from pipeline.shards import array_bytes
from tests.trainer.conftest import build_recipe
from trainer.evaluate import compare, distances, evaluate
from trainer.recipe import Recipe
from trainer.train import train

NAMES = ("red", "green", "blue", "yellow", "pink", "black")
COLOURS = ((220, 30, 30), (30, 180, 30), (30, 30, 220), (230, 220, 30), (240, 150, 200), (10, 10, 10))


def picture(number: int) -> tuple[str, np.ndarray]:
    """36 different pictures: one colour above, one below, on white."""
    above, below = divmod(number, 6)
    pixels = np.full((48, 32, 3), 255, np.uint8)
    pixels[12:24, 4:28], pixels[24:36, 4:28] = COLOURS[above], COLOURS[below]
    return f"{NAMES[above]} above {NAMES[below]}", pixels


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = Corpus.create(tmp_path_factory.mktemp("coloured"), "coloured", 12)
    corpus.declare_source("art", {"adapter": "made-up"})
    corpus.declare_column("images", {"stage": "images"})
    corpus.declare_column("captions/source", {"stage": "captions"}, {"caption": "string", "tokens": "int32"})
    autoencoder, encoder = load_autoencoder("demo"), load_text_encoder("minilm")
    corpus.declare_column(
        "latents/demo-32",
        {"autoencoder": "demo", "revision": None, "resolution": 32, "model": autoencoder.fingerprint},
    )
    corpus.declare_column("text/minilm@source", {"encoder": "minilm", "revision": None, "model": encoder.fingerprint})
    for shard in range(3):
        ref = ShardRef(source="art", unit="art-000000", shard=f"art-000000-{shard:02d}")
        rows = [(row, f"k{12 * shard + row}", *picture(12 * shard + row)) for row in range(12)]
        with corpus.attempt("images", ref) as attempt:
            for row, key, _, pixels in rows:
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                attempt.add(row, key, {"png": buffer.getvalue(), "json": b"{}"})
            images = attempt.commit()
        with corpus.attempt("captions/source", ref, [images]) as attempt:
            for row, key, caption, _ in rows:
                attempt.add(row, key, caption=caption, tokens=3)
            captions = attempt.commit()
        latents = autoencoder.encode(np.stack([pixels[8:40] for *_, pixels in rows]), posterior="mode").numpy()
        with corpus.attempt("latents/demo-32", ref, [images]) as attempt:
            for row, key, *_ in rows:
                attempt.add(row, key, {"npy": array_bytes(latents[row].astype(np.float16))})
            attempt.commit()
        text, lengths = encoder.encode([caption for _, _, caption, _ in rows])
        with corpus.attempt("text/minilm@source", ref, [captions]) as attempt:
            for row, key, *_ in rows:
                attempt.add(row, key, {"npy": array_bytes(text[row, : lengths[row]].numpy().astype(np.float16))})
            attempt.commit()
    return corpus


def short_recipe(corpus: Corpus, out: Path, **fields) -> Recipe:
    stage = {"latents": "latents/demo-32", "batch": 32, "learning_rate": 3e-3, "ema_half_life": 200, "warmup": 100}
    stage["p_mean"] = 0.6
    base = {"text": {"text/minilm@source": 1.0}, "hold_out": 6, "guidance_scale": 1.0, "log_every": 50}
    base["stages"] = [stage | {"steps": 400, "schedule": "cosine"}]
    return build_recipe(corpus, out, **(base | fields))


def test_what_was_learned_shows(coloured: Corpus, tmp_path: Path) -> None:
    summary = train(short_recipe(coloured, tmp_path / "run"))
    found = evaluate(tmp_path / "run", count=16, num_inference_steps=6)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == found
    assert found["checkpoint"] == Path(summary["checkpoint"]).name
    assert (found["count"], found["held_out_count"], found["images"]) == (16, 6, 36)
    untrained = found["untrained"]
    assert found["psnr"] > untrained["psnr"] + 3
    assert found["nearest_in_count"] >= 6 > 3 >= untrained["nearest_in_count"]
    assert 0 <= found["nearest_in_all"] <= found["nearest_in_count"]
    assert 0 <= found["held_out_nearest_in_count"] <= 6
    with Image.open(tmp_path / "run" / "grid.png") as sheet:
        assert sheet.width > 4 * 96
    other = evaluate(summary["checkpoint"], tmp_path / "other", count=16, num_inference_steps=6)
    assert other == found and (tmp_path / "other" / "grid.png").exists()


def test_without_a_hold_out_and_on_other_samples(coloured: Corpus, tmp_path: Path) -> None:
    recipe = short_recipe(coloured, tmp_path / "run", hold_out=0)
    stages = [recipe.stages[0].model_copy(update={"steps": 2})]
    train(recipe.model_copy(update={"stages": stages}))
    found = evaluate(tmp_path / "run", count=100, num_inference_steps=2)
    assert (found["count"], found["held_out_count"], found["held_out_nearest_in_count"]) == (36, 0, None)
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    stored = json.loads(state.read_text())
    stored["data"][-1]["digest"] = "0" * 16
    state.write_text(json.dumps(stored))
    with pytest.raises(RequestError, match="was trained on other samples"):
        evaluate(tmp_path / "run")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        evaluate(tmp_path / "nowhere")


def test_figures_of_known_pictures() -> None:
    rng = np.random.default_rng(0)
    images = {f"art/s/{i}": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for i in range(12)}
    some = dict(list(images.items())[4:8])
    real = {"trained": some, "held_out": {"art/s/9": images["art/s/9"]}}
    perfect = compare({kind: np.stack(list(r.values())) for kind, r in real.items()}, real, images)
    assert (perfect["nearest_in_count"], perfect["nearest_in_all"], perfect["held_out_nearest_in_count"]) == (4, 4, 1)
    assert perfect["psnr"] == pytest.approx(68.13, abs=0.01)
    # the picture of one is another one of the count, of one another one of all, two are right but for noise
    wrong = [images["art/s/5"], images["art/s/0"]]
    near = [np.clip(images[f"art/s/{i}"].astype(int) + rng.integers(-9, 10, (8, 8, 3)), 0, 255) for i in (6, 7)]
    found = compare({"trained": np.stack([*wrong, *near]).astype(np.uint8)}, {"trained": some}, images)
    assert found["nearest_in_all"] == 2 and found["nearest_in_count"] in (2, 3)
    assert found["held_out_psnr"] is None and found["psnr"] < perfect["psnr"]


def test_distances_are_exact() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8) for n in (3, 5))
    expected = [[((x.astype(float) - y) ** 2).mean() for y in b] for x in a]
    np.testing.assert_array_equal(distances(a, list(b)), np.array(expected))
    assert torch.tensor(distances(a, list(a))).diagonal().eq(0).all()
