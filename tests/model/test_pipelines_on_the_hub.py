"""Pipelines and weights on the hub, and the released names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from microdit.model import loading
from microdit.model.checkpoint import CheckpointError, write_state_dict
from microdit.model.edm import EDM
from microdit.model.network import PRESETS
from microdit.model.pretrained.autoencoder import AUTOENCODERS
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.text import load_text_encoder
from microdit.model.pretrained.text_registry import TEXT_ENCODERS
from microdit.model.text_to_image import MicroDiTPipeline
from tests.model.pretrained.openclip_format import DATA, read_tower, write_model
from tests.model.pretrained.test_autoencoder import kl
from tests.model.tiny import SIZES, latents, network
from tests.servers.hub import Hub

PRESET = {name: size for name, size in SIZES.items() if name not in ("input_size", "caption_channels")}


def test_a_pipeline_on_the_hub(pipe: MicroDiTPipeline, tmp_path: Path, hub: Hub) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    extra = tmp_path / "saved" / "text_encoder" / "pytorch_model.bin"
    extra.write_bytes(b"a pickle that nobody asked for")
    first = hub.add("owner/small", tmp_path / "saved")
    hub.add("owner/small", {"model_index.json": b"{}"})
    again = MicroDiTPipeline.from_pretrained("owner/small", revision=first[:12])
    assert torch.equal(latents(again), latents(pipe))
    assert again.settings == {
        "checkpoint": "owner/small", "revision": first, "autoencoder": "demo", "text_encoder": "minilm"
    }  # fmt: skip
    assert not [path for path in hub.downloads() if path.endswith(".bin")]
    with pytest.raises(CheckpointError, match="expected a MicroDiTPipeline"):
        MicroDiTPipeline.from_pretrained("owner/small")


def test_weights_on_the_hub(run: Path, hub: Hub) -> None:
    weights = (run / "checkpoints" / "step-00000005" / "model.safetensors").read_bytes()
    commit = hub.add("owner/nets", {"deep/net.safetensors": weights, "deep/other.safetensors": b"-"})
    found = MicroDiTPipeline.from_pretrained(
        "owner/nets/deep/net.safetensors", autoencoder="demo", text_encoder="minilm"
    )
    assert found.settings["revision"] == commit and hub.downloads() == ["deep/net.safetensors"]
    with pytest.raises(CheckpointError, match="name the autoencoder and the text encoder"):
        loading.find_parts("owner/nets/deep/net.safetensors")
    with pytest.raises(CheckpointError, match=rf"owner/nets has no net\.safetensors at {commit}"):
        loading.find_parts("owner/nets/net.safetensors")
    with pytest.raises(CheckpointError, match=r"owner/nets has no model_index\.json"):
        loading.find_parts("owner/nets")
    with pytest.raises(
        ModelFilesError, match=r"no such file or folder here, and on the hub: .*no repository runs/large"
    ):
        loading.find_parts("runs/large")


def test_released_names(hub: Hub) -> None:
    weights = {f"ckpts/{name}": name.encode() for name in loading.RELEASED}
    commit = hub.add(loading.RELEASED_REPO, weights)
    for name, autoencoder in loading.RELEASED.items():
        for asked in (
            name, f"ckpts/{name}", f"VSehwag24/MicroDiT/ckpts/{name}",
            f"{hub.url}/VSehwag24/MicroDiT/blob/main/ckpts/{name}",
            f"{hub.url}/VSehwag24/MicroDiT/resolve/{commit}/ckpts/{name}?download=true",
        ):  # fmt: skip
            parts = loading.find_parts(asked)
            assert parts.weights.read_bytes() == name.encode()
            assert (parts.autoencoder.where, parts.text_encoder.where) == (autoencoder, "dfn-clip-h")
            assert parts.config == {"input_size": 64, "pos_interp_scale": 2.0}
            assert (parts.guidance_scale, parts.edm) == (5.0, EDM(sigma_data=0.9))
            assert parts.origin == {"checkpoint": f"VSehwag24/MicroDiT/ckpts/{name}", "revision": commit}
    with pytest.raises(CheckpointError, match="holds several checkpoints, name one: dit_4_channel_22M"):
        loading.find_parts("VSehwag24/MicroDiT")


@pytest.mark.parametrize(
    ("name", "codec", "channels"),
    [("dit_4_channel_37M_real_and_synthetic_data.pt", "sdxl", 4),
     ("dit_16_channel_37M_real_and_synthetic_data.pt", "ostris", 16)],
)  # fmt: skip
def test_a_released_checkpoint(
    name: str, codec: str, channels: int, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small network under the released name, and small ones of the same classes for its encoders."""
    spec, _ = read_tower(DATA / "openclip")
    write_model(tmp_path / "clip", spec)
    text = TEXT_ENCODERS["dfn-clip-h"]
    hub.add(str(text.where), tmp_path / "clip", commit=text.revision)
    entry = AUTOENCODERS[codec]
    kl(latent_channels=channels).save_pretrained(tmp_path / "made" / (entry.subfolder or ""))
    assert entry.revision
    hub.add(entry.where, tmp_path / "made", commit=entry.revision.ljust(40, "0"))
    # a released file tells its head size by the preset of its width and depth
    monkeypatch.setitem(PRESETS, "small", PRESET)
    sizes: dict[str, Any] = {"in_channels": channels, "caption_channels": 64, "input_size": 64, "pos_interp_scale": 2.0}
    net = network(1, **sizes)
    write_state_dict(tmp_path / "net.pt", net.state_dict())
    hub.add("VSehwag24/MicroDiT", {f"ckpts/{name}": (tmp_path / "net.pt").read_bytes()})

    pipe = MicroDiTPipeline.from_pretrained(f"VSehwag24/MicroDiT/ckpts/{name}")
    assert pipe.sample_size == (64, 64) and pipe.transformer.config == net.config
    assert torch.equal(pipe.transformer.pos_embed, net.pos_embed)
    found = latents(pipe, ["red apple", "a dog"], num_inference_steps=1, batch_size=1)
    assert found.shape == (2, channels, 64, 64) and pipe.guidance_scale == 5.0
    embeddings, _ = load_text_encoder("dfn-clip-h").encode(["red apple"])
    assert embeddings.shape == (1, 77, 64)
    noise = torch.randn(channels, 64, 64, generator=torch.Generator().manual_seed(0))
    wanted = EDM().sample(net, noise[None], embeddings, num_inference_steps=1)  # released: no mask, zeros, guidance 5
    assert torch.equal(found[:1], wanted)
    assert pipe("red apple", height=64, width=64, num_inference_steps=1, seed=0).images[0].size == (64, 64)


def test_a_table_of_another_scale_is_no_released_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", PRESET)
    path = tmp_path / "dit_4_channel_0.5B_synthetic_data.pt"  # here, under a released name
    write_state_dict(path, network(1, input_size=64, pos_interp_scale=1.0).state_dict())
    with pytest.raises(CheckpointError, match=re.escape("pos_interp_scale=1, the model has 2")):
        MicroDiTPipeline.from_pretrained(path, autoencoder="demo", text_encoder="minilm")
