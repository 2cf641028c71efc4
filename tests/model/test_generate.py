import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import CheckpointError, write_state_dict
from model.generate import checkpoint_folders, find_checkpoint, generate, grid, load_generator
from model.network import MicroDiT

PROMPTS = ["red apple", "a very long caption about a lighthouse in the fog that goes on", "dog"]
INFO = {
    "latent_shape": [4, 4, 4],
    "sigma_data": 0.9,
    "guidance_scale": 2.0,
    "latents": {"autoencoder": "demo", "revision": None, "resolution": 32},
    "text": {"encoder": "minilm", "revision": None},
}


def network(seed: int) -> MicroDiT:
    torch.manual_seed(seed)
    net = MicroDiT(
        input_size=4, dim=32, depth=2, head_dim=16, multiple_of=8, caption_channels=384, patch_mixer_depth=1,
        patch_mixer_dim=32, num_experts=2,
    )  # fmt: skip
    for parameter in net.parameters():  # a fresh network gives zero, whatever the caption
        torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two checkpoints; only the newer one has a moving average."""
    for step, names in ((5, ("model",)), (10, ("model", "ema"))):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for seed, name in enumerate(names):
            net = network(step + seed)
            write_state_dict(folder / f"{name}.safetensors", net.state_dict(), net.config)
        (folder / "generate.json").write_text(json.dumps(INFO))
    (tmp_path / "run" / "checkpoints" / "step-00000020.partial").mkdir()
    return tmp_path / "run"


def arrays(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def test_pictures_are_written_with_what_made_them_and_can_be_made_again(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    pictures = generate(run, PROMPTS, out, num_inference_steps=3, seed=7)
    assert [picture.size for picture in pictures] == [(32, 32)] * 3
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "0-red-apple.png",
        "1-a-very-long-caption-about-a-lighthouse-in-the-fog-that-goes-on.png"[:62] + ".png",
        "2-dog.png",
        "grid.png",
    ]
    with Image.open(out / names[1]) as stored:
        assert stored.info["prompt"] == PROMPTS[1]
        settings = json.loads(stored.info["parameters"])
        assert np.array_equal(np.asarray(stored), np.asarray(pictures[1]))
    assert settings["seed"] == 8 and settings["guidance_scale"] == 2.0 and settings["num_inference_steps"] == 3
    assert settings["checkpoint"].endswith("step-00000010/ema.safetensors")
    # alone, by what the picture says: the same up to the rounding of another batch shape
    again = generate(run, [settings["prompt"]], num_inference_steps=3, seed=settings["seed"])
    assert np.abs(arrays(again)[0].astype(int) - np.asarray(pictures[1])).max() <= 2


def test_prompt_seed_guidance_and_sampler_matter(run: Path) -> None:
    def make(prompt="dog", **options):
        return arrays(generate(run, [prompt], **({"num_inference_steps": 3} | options)))

    base = make()
    assert np.array_equal(base, make())
    others = [make("red apple"), make(seed=1), make(guidance_scale=4.0), make(sampler="dpmpp_2m"), make(ema=False)]
    for other in others:
        assert not np.array_equal(base, other)


def test_batches_do_not_change_pictures(run: Path) -> None:
    generator = load_generator(run)
    whole = generator(PROMPTS, num_inference_steps=2).astype(int)
    parts = generator(PROMPTS, num_inference_steps=2, batch=2).astype(int)
    assert whole.shape == (3, 32, 32, 3) and np.abs(whole - parts).max() <= 2


def test_one_checkpoint_and_a_file_of_weights(run: Path) -> None:
    older = run / "checkpoints" / "step-00000005"
    assert find_checkpoint(run).name == "step-00000010" and find_checkpoint(older) == older
    assert [folder.name for folder in checkpoint_folders(run)] == ["step-00000010", "step-00000005"]
    by_folder = generate(older, ["dog"], num_inference_steps=2, guidance_scale=3)
    by_file = generate(
        older / "model.safetensors", ["dog"], num_inference_steps=2, guidance_scale=3, autoencoder="demo",
        text_encoder="minilm",
    )  # fmt: skip
    assert np.array_equal(arrays(by_folder), arrays(by_file))


def test_what_cannot_be_used_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: there is no checkpoint; expected the out folder"):
        generate(tmp_path / "nothing", PROMPTS)
    with pytest.raises(CheckpointError, match="name the autoencoder and the text encoder"):
        generate(run / "checkpoints" / "step-00000005" / "model.safetensors", PROMPTS)
    info = run / "checkpoints" / "step-00000010" / "generate.json"
    info.write_text(json.dumps(INFO | {"latents": INFO["latents"] | {"model": {"sha256": "other"}}}))
    with pytest.raises(CheckpointError, match=r"was trained with another 'demo'.*sha256.*other"):
        generate(run, PROMPTS)
    info.write_text('{"latent_shape": [4, 4')
    with pytest.raises(CheckpointError, match=r"generate\.json is damaged"):
        generate(run, PROMPTS)


@pytest.mark.parametrize(("cells", "each", "columns"), [(1, 1, None), (7, 2, None), (64, 2, None), (6, 1, 3)])
def test_grid_holds_all_pictures(cells: int, each: int, columns: int | None) -> None:
    colours = [(10 + 3 * i, 200 - 3 * i, 50) for i in range(cells)]
    pictures = [[Image.new("RGB", (64, 64), colour)] * each for colour in colours]
    sheet = grid(pictures, [f"caption {i} that is far too long for its place" for i in range(cells)], columns)
    found = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert set(colours) <= found
    if cells == 64:
        assert 0.7 < sheet.width / sheet.height < 1.4
