"""Tiny networks and checkpoints, for tests of what is done with whole models."""

import json
from pathlib import Path
from typing import Any

import torch

from microdit.model.checkpoint import write_state_dict
from microdit.model.network import MicroDiT
from microdit.model.text_to_image import MicroDiTPipeline

SIZES = {
    "input_size": 4, "dim": 32, "depth": 3, "head_dim": 16, "multiple_of": 8, "caption_channels": 384,
    "patch_mixer_depth": 1, "patch_mixer_dim": 32, "num_experts": 2,
}  # fmt: skip

INFO = {
    "latent_shape": [4, 4, 4],
    "sigma_data": 0.9,
    "guidance_scale": 2.0,
    "latents": {"autoencoder": "demo", "revision": None, "resolution": 32},
    "text": {"encoder": "minilm", "revision": None},
}

PROMPTS = ["red apple", "a very long caption about a lighthouse in the fog that goes on", "dog"]
# of other batch shapes, whose matrix products round otherwise; another prompt or seed moves latents by 1 and more
ROUNDING = 5e-3


def network(seed: int, **sizes: Any) -> MicroDiT:
    """For the demo autoencoder and minilm, at 32 px, if not told otherwise. Its pictures depend on the caption."""
    torch.manual_seed(seed)
    net = MicroDiT(**(SIZES | sizes)).eval()
    for parameter in net.parameters():  # a fresh network gives zero, whatever the caption
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def write_run(folder: Path) -> Path:
    """A run's folder with two checkpoints; only the newer one has a moving average."""
    for step, names in ((5, ("model",)), (10, ("model", "ema"))):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        for seed, name in enumerate(names):
            net = network(step + seed)
            write_state_dict(checkpoint / f"{name}.safetensors", net.state_dict(), net.config)
        (checkpoint / "generate.json").write_text(json.dumps(INFO))
    (folder / "checkpoints" / "step-00000020.partial").mkdir()
    return folder


def latents(pipe: MicroDiTPipeline, prompt: Any = "dog", *arguments: Any, **options: Any) -> torch.Tensor:
    """What a call draws, before it is decoded."""
    return pipe(prompt, *arguments, **({"num_inference_steps": 3, "seed": 0, "output_type": "latent"} | options)).images
