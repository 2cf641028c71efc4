"""The released code's interface: the snippet of the model card, and the same pictures as the pipeline's."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microdit.model.checkpoint import write_state_dict
from microdit.model.edm import EDM
from microdit.model.latent_diffusion import LatentDiffusion, create_latent_diffusion
from microdit.model.network import PRESETS, MicroDiT
from microdit.model.pretrained.autoencoder import AUTOENCODERS, load_autoencoder
from microdit.model.pretrained.text import load_text_encoder
from microdit.model.pretrained.text_registry import TEXT_ENCODERS
from microdit.model.text_to_image import MicroDiTPipeline
from tests.model.pretrained.openclip_format import DATA, read_tower, write_model
from tests.model.pretrained.test_autoencoder import kl
from tests.model.tiny import SIZES, network
from tests.servers.hub import Hub

TINY = {name: size for name, size in SIZES.items() if name != "input_size"}
CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0}

# the model card's, but for the import, the device, and the number of steps
CARD = """
import torch
from microdit import create_latent_diffusion

params = {"latent_res": 64, "in_channels": 4, "pos_interp_scale": 2.0}
model = create_latent_diffusion(**params).to("cpu")

from huggingface_hub import hf_hub_download

model_dict_path = hf_hub_download(
    repo_id="VSehwag24/MicroDiT", filename="ckpts/dit_4_channel_37M_real_and_synthetic_data.pt"
)
float_model_params = {k: v.to(torch.float32) for k, v in torch.load(model_dict_path).items()}
model.dit.load_state_dict(float_model_params)
model = model.eval()
prompts = ["An elegant squirrel pirate on a ship"] * 2
gen_images = model.generate(prompt=prompts, num_inference_steps=2, guidance_scale=5.0, seed=2024)
"""


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    made = create_latent_diffusion(latent_res=4, vae_name="demo", text_encoder_name="minilm", **TINY)
    made.dit.load_state_dict(network(3).state_dict())
    return made


def pipeline(of: LatentDiffusion) -> MicroDiTPipeline:
    """A pipeline of its own with the same weights."""
    net = MicroDiT(**of.dit.config)
    net.load_state_dict(of.dit.state_dict())
    return MicroDiTPipeline(net, load_autoencoder("demo"), load_text_encoder("minilm"))


def test_one_picture_is_the_pipelines_of_the_same_seed(model: LatentDiffusion) -> None:
    images = model.generate(["red apple"], seed=2024, **CALL)
    assert (images.shape, images.dtype) == ((1, 3, 32, 32), torch.float32) and 0 <= images.min() <= images.max() <= 1
    wanted = pipeline(model)("red apple", seed=2024, output_type="pt", **CALL).images
    assert torch.equal(images, wanted)
    pil = pipeline(model)("red apple", seed=2024, **CALL).images[0]
    assert np.array_equal(np.asarray(pil), (images[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    assert torch.equal(model.generate("red apple", seed=2024, **CALL), images)
    assert not torch.equal(model.generate(["red apple"], seed=2025, **CALL), images)
    latents = model.generate(["red apple"], seed=2024, return_only_latents=True, **CALL)
    assert torch.equal(latents, pipeline(model)("red apple", seed=2024, output_type="latent", **CALL).images)


def test_several_pictures_share_a_generator_as_released(model: LatentDiffusion) -> None:
    prompts = ["red apple", "dog", "red apple"]
    images = model.generate(prompts, seed=7, **CALL)
    one = torch.Generator().manual_seed(7)
    assert torch.equal(images, pipeline(model)(prompts, generator=one, output_type="pt", **CALL).images)
    assert not torch.equal(images[0], images[2])
    # the released code: the noise of all, then one loop over them, zeros as the unconditional text
    noise = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(7))
    text, _ = load_text_encoder("minilm").encode(["dog"])
    wanted = EDM().sample(model.dit, noise, text.expand(2, -1, -1), **CALL)
    assert torch.equal(model.generate(["dog"] * 2, seed=7, return_only_latents=True, **CALL), wanted)


def test_without_a_seed_it_is_that_of_a_fresh_generator(model: LatentDiffusion) -> None:
    state = torch.get_rng_state()
    found = [model.generate(["dog"], **options, **CALL) for options in ({}, {"seed": None}, {"seed": 0})]
    assert torch.equal(state, torch.get_rng_state())
    fresh = pipeline(model)("dog", generator=torch.Generator(), output_type="pt", **CALL).images
    assert all(torch.equal(one, fresh) for one in found)


def test_the_encoders_come_with_the_first_picture_and_follow_the_network(model: LatentDiffusion) -> None:
    made = create_latent_diffusion(latent_res=4, vae_name="no such one", text_encoder_name="minilm", **TINY)
    with pytest.raises(ValueError, match="no such one"):
        made.generate(["dog"], **CALL)
    assert isinstance(made.eval(), LatentDiffusion) and made.to("cpu") is made
    pipe = (
        create_latent_diffusion(latent_res=4, vae_name="demo", text_encoder_name="minilm", **TINY).to("meta").pipeline()
    )
    assert {pipe.device.type, pipe.vae.device.type, pipe.text_encoder.device.type} == {"meta"}
    with pytest.raises(ValueError, match=r"num_inference_steps=0: expected at least 1"):
        model.generate(["dog"], num_inference_steps=0)


@pytest.mark.parametrize(("channels", "vae"), [(4, "sdxl"), (16, "ostris")])
def test_what_is_taken_by_channels(channels: int, vae: str) -> None:
    made = create_latent_diffusion(64, channels, 2.0, **{k: v for k, v in TINY.items() if k != "caption_channels"})
    assert (made.vae_name, made.text_encoder_name) == (vae, "dfn-clip-h")
    config = made.dit.config
    assert (config["input_size"], config["pos_interp_scale"], config["in_channels"]) == (64, 2.0, channels)
    assert config["caption_channels"] == 1024  # as wide as that text tower
    with pytest.raises(ValueError, match=r"in_channels=8: expected one of 4, 16, or a vae_name"):
        create_latent_diffusion(in_channels=8)
    named = create_latent_diffusion(vae_name="ostris/vae-kl-f8-d16", text_encoder_name="openclip:hf-hub:a/b", **TINY)
    assert (named.vae_name, named.text_encoder_name) == ("ostris/vae-kl-f8-d16", "a/b")


def test_the_default_network_is_the_released_one() -> None:
    with torch.device("meta"):
        state = create_latent_diffusion(64, 4, 2.0).dit.state_dict()
    assert len(state) == 478 and state["pos_embed"].shape == (1, 1024, 1024)


def test_the_snippet_of_the_model_card(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small models in the places of the released ones; its pictures are those of the pipeline."""
    spec, _ = read_tower(DATA / "openclip")
    write_model(tmp_path / "clip", spec)
    text, vae = TEXT_ENCODERS["dfn-clip-h"], AUTOENCODERS["sdxl"]
    hub.add(str(text.where), tmp_path / "clip", commit=text.revision)
    kl(latent_channels=4).save_pretrained(tmp_path / "made" / "vae")
    hub.add(vae.where, tmp_path / "made", commit=vae.revision)
    small = {name: size for name, size in SIZES.items() if name not in ("input_size", "caption_channels")}
    monkeypatch.setitem(PRESETS, "xl_2", small | {"caption_channels": 64})
    net = network(1, input_size=64, pos_interp_scale=2.0, caption_channels=64)
    name = "ckpts/dit_4_channel_37M_real_and_synthetic_data.pt"
    write_state_dict(tmp_path / "net.pt", net.state_dict())
    hub.add("VSehwag24/MicroDiT", {name: (tmp_path / "net.pt").read_bytes()})

    assert re.findall("from micro.*", CARD) == ["from microdit import create_latent_diffusion"]
    names: dict[str, Any] = {}
    exec(CARD, names)
    images = names["gen_images"]
    assert images.shape == (2, 3, 512, 512)
    pipe = MicroDiTPipeline.from_pretrained(f"VSehwag24/MicroDiT/{name}")
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(2024)}
    assert torch.equal(images, pipe(names["prompts"], output_type="pt", **options).images)
