"""The repositories of the configs' models, at the pinned commits: the same classes, small and with random weights."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from microdit.model.pretrained.autoencoder import AUTOENCODERS
from microdit.model.pretrained.text_registry import TEXT_ENCODERS
from tests.model.pretrained.openclip_format import DATA, read_tower, write_model
from tests.model.pretrained.text_models import t5_files
from tests.servers.hub import Hub

CHANNELS = {"sdxl": 4, "ostris": 16}
FOUR = 4  # blocks: eight pixels for one latent


def publish_models(hub: Hub, folder: Path) -> None:
    """Make the models in `folder` and put them on a hub."""
    for name, channels in CHANNELS.items():
        entry = AUTOENCODERS[name]
        torch.manual_seed(0)
        module = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * FOUR,
            up_block_types=("UpDecoderBlock2D",) * FOUR,
            block_out_channels=(2,) * FOUR,
            layers_per_block=1,
            norm_num_groups=1,
            mid_block_add_attention=False,
            latent_channels=channels,
            scaling_factor=0.13025,
        )
        target = folder / name / entry.subfolder if entry.subfolder else folder / name
        module.save_pretrained(target)
        hub.add(entry.where, folder / name, commit=(entry.revision or "").ljust(40, "0"))
    text = {"t5-xxl": t5_files(folder / "t5")}
    write_model(folder / "clip", read_tower(DATA / "openclip")[0])
    text["dfn-clip-h"] = {path.name: path.read_bytes() for path in (folder / "clip").iterdir()}
    for name, files in text.items():
        hub.add(str(TEXT_ENCODERS[name].where), files, commit=TEXT_ENCODERS[name].revision)
