"""Pipelines saved and loaded, and opened from runs and files of weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from microdit.model import loading
from microdit.model.checkpoint import CheckpointError
from microdit.model.edm import EDM
from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.model.pretrained.text import load_text_encoder
from microdit.model.text_to_image import MicroDiTPipeline
from tests.model.pretrained.test_autoencoder import flux2, kl
from tests.model.pretrained.text_models import clip_files, gemma_files, t5_files
from tests.model.tiny import INFO, PROMPTS, latents, network, write_run


def test_saved_and_loaded(run: Path, pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    again = MicroDiTPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    for prompt in PROMPTS:
        assert torch.equal(latents(again, prompt, ""), latents(pipe, prompt, ""))
    picture = again("dog", num_inference_steps=2, seed=1).images[0]
    assert np.array_equal(np.asarray(picture), np.asarray(pipe("dog", num_inference_steps=2, seed=1).images[0]))
    assert again.guidance_scale == 2.0 and again.settings["autoencoder"] == "demo"
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "MicroDiTPipeline" and index["vae"] == ["diffusers", "AutoencoderKL"]
    AutoencoderKL.from_pretrained(tmp_path / "saved", subfolder="vae")  # diffusers reads its part
    assert not [path for path in (tmp_path / "saved").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    with pytest.raises(FileExistsError, match="saved is there already: give a new folder"):
        pipe.save_pretrained(tmp_path / "saved")


def test_saved_with_what_is_not_in_the_files(tmp_path: Path) -> None:
    """Latents of another size than the network was built for, sigma_data, and an option of the text encoder."""
    text = load_text_encoder("minilm", max_tokens=5, dtype=torch.bfloat16)
    edm = EDM(sigma_data=0.5)
    pipe = MicroDiTPipeline(network(3), load_autoencoder("demo"), text, edm=edm, sample_size=(4, 8), guidance_scale=3)
    pipe.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    again = MicroDiTPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert (again.sample_size, again.edm, again.guidance_scale) == ((4, 8), edm, 3)
    assert again.text_encoder.max_tokens == 5
    assert torch.equal(latents(again, PROMPTS[1]), latents(pipe, PROMPTS[1]))


@pytest.mark.parametrize("files", [t5_files, gemma_files, clip_files])
def test_every_family_of_text_encoders_can_be_saved(files: Any, tmp_path: Path) -> None:
    for name, data in files(tmp_path / "made").items():
        (tmp_path / "made" / name).write_bytes(data)
    options: dict[str, Any] = {}
    if files is gemma_files:
        options = {"template": "user\n{caption} model\n", "hidden_layer": 1, "max_tokens": 9}
    text = load_text_encoder(tmp_path / "made", dtype=torch.float32, **options)
    pipe = MicroDiTPipeline(network(0, caption_channels=32), load_autoencoder("demo"), text)
    pipe.save_pretrained(tmp_path / "saved")
    again = MicroDiTPipeline.from_pretrained(tmp_path / "saved").text_encoder
    captions = [*PROMPTS, "", "a café ☕ &amp; a DOG's boat", "<end_of_text> \n fog"]
    for one, other in zip(again.encode(captions), text.encode(captions), strict=True):
        assert torch.equal(one, other)
    assert again._module.dtype == torch.float32 and again.max_tokens == text.max_tokens


def test_an_autoencoder_with_a_batch_norm_keeps_its_digits(tmp_path: Path) -> None:
    flux2().save_pretrained(tmp_path / "made")
    codec = load_autoencoder(tmp_path / "made")
    net = network(0, in_channels=16)
    MicroDiTPipeline(net, codec, load_text_encoder("minilm")).save_pretrained(tmp_path / "saved")
    again = MicroDiTPipeline.from_pretrained(tmp_path / "saved").vae
    assert again.fingerprint["dtype"] == "bfloat16"
    z = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = codec.decode(z)
    assert torch.equal(again.decode(z), pixels)
    assert torch.equal(again.encode(pixels, seeds=[0]), codec.encode(pixels, seeds=[0]))


def test_parts_that_do_not_fit_together(run: Path, tmp_path: Path) -> None:
    kl(latent_channels=16).save_pretrained(tmp_path / "kl16")
    with pytest.raises(
        ValueError, match=r"kl16' has latents of 16 channels, the network takes 4: name the autoencoder"
    ):
        MicroDiTPipeline.from_pretrained(run, autoencoder=str(tmp_path / "kl16"))
    for name, data in t5_files(tmp_path / "t5").items():
        (tmp_path / "t5" / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"t5' is 32 wide, the network takes 384: name the text encoder"):
        MicroDiTPipeline.from_pretrained(run, text_encoder=str(tmp_path / "t5"))


def test_a_pipeline_that_older_code_saved(pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    """Before the package was called microdit, the index named the module of the network otherwise."""
    pipe.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model_index.json"
    index = json.loads(path.read_text())
    assert index["transformer"] == ["microdit.model.network", "MicroDiT"]
    path.write_text(json.dumps(index | {"transformer": ["model.network", "MicroDiT"]}))
    assert torch.equal(latents(MicroDiTPipeline.from_pretrained(tmp_path / "saved")), latents(pipe))


def test_damaged_pipelines(pipe: MicroDiTPipeline, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    pipe.save_pretrained(saved)
    whole = json.loads((saved / "model_index.json").read_text())
    for index, message in (
        (whole | {"_class_name": "FluxPipeline"}, "it is a FluxPipeline, expected a MicroDiTPipeline"),
        (whole | {"sample_size": 4}, r"model_index\.json is damaged"),
        (whole | {"edm": {"sigma": 1}}, r"model_index\.json is damaged"),
        (whole | {"vae_options": {"name": "demo", "dtype": "load"}}, r"model_index\.json is damaged.*load"),
        ({k: v for k, v in whole.items() if k != "text_encoder_options"}, r"damaged.*text_encoder_options"),
        ([], r"model_index\.json is damaged \(it is no JSON object\)"),
    ):
        (saved / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=message):
            MicroDiTPipeline.from_pretrained(saved)
    (saved / "model_index.json").write_text(json.dumps(whole))
    (saved / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: no such file"):
        MicroDiTPipeline.from_pretrained(saved)


def test_a_run_a_checkpoint_and_a_file(run: Path, tmp_path: Path) -> None:
    older, newer = (run / "checkpoints" / f"step-{step:08d}" for step in (5, 10))
    assert loading.checkpoint_folders(run) == [newer, older]
    assert loading.find_parts(run).weights == newer / "ema.safetensors"
    assert loading.find_parts(older).weights == older / "model.safetensors"
    beside = loading.find_parts(newer / "model.safetensors")  # generate.json is beside it
    assert (beside.guidance_scale, beside.sample_size, beside.text_encoder.name) == (2.0, (4, 4), "minilm")
    bare = tmp_path / "net.safetensors"
    bare.write_bytes((older / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="name the autoencoder and the text encoder"):
        loading.find_parts(bare, autoencoder="demo")
    by_file = MicroDiTPipeline.from_pretrained(bare, autoencoder="demo", text_encoder="minilm")
    by_folder = MicroDiTPipeline.from_pretrained(older)
    assert (by_file.guidance_scale, by_folder.guidance_scale) == (5.0, 2.0)
    assert torch.equal(latents(by_file, guidance_scale=3.0), latents(by_folder, guidance_scale=3.0))


def test_a_column_says_how_its_text_was_made(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / "checkpoints" / "step-00000010" / "generate.json"
    model = load_text_encoder("minilm", max_tokens=7).fingerprint
    path.write_text(json.dumps(INFO | {"text": {"encoder": "minilm", "revision": None, "model": model}}))
    assert MicroDiTPipeline.from_pretrained(run).text_encoder.max_tokens == 7


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    info = run / "checkpoints" / "step-00000010" / "generate.json"
    info.write_text(json.dumps(INFO | {"latents": {"autoencoder": "demo", "model": {"folder": "demo", "sha256": "f"}}}))
    with pytest.raises(CheckpointError, match=r"was trained with another 'demo'.*sha256.*Name the one to take"):
        MicroDiTPipeline.from_pretrained(run)
    assert MicroDiTPipeline.from_pretrained(run, autoencoder="demo").settings["autoencoder"] == "demo"
    for text in ('{"latent_shape": [4, 4', '{"latent_shape": [4, 4]}', "{}", "7"):
        info.write_text(text)
        with pytest.raises(CheckpointError, match=r"generate\.json is damaged.*take an older checkpoint"):
            loading.find_parts(run)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no weights")
    for name in ("empty", "nothing", "notes.txt", "nothing.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{name}: there is no checkpoint; expected .*dit_4_channel_22M"):
            loading.find_parts(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"revision='main' was given with .*run, which is on this machine"):
        loading.find_parts(run, revision="main")
