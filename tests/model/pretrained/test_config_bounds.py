"""Configs that describe larger models than their weights: refused before anything of their size is built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microdit.model.pretrained.autoencoder import load_autoencoder
from microdit.model.pretrained.captioners import load_captioner
from microdit.model.pretrained.config_bounds import check_config
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.text import load_text_encoder
from microdit.model.pretrained.vision import load_vision_model
from tests.model.pretrained.captioner_models import vision_folder
from tests.model.pretrained.test_autoencoder import kl, saved
from tests.model.pretrained.text_models import bert_files
from tests.model.pretrained.vision_models import clip_model

pytestmark = pytest.mark.usefixtures("bounded")


@pytest.mark.parametrize(
    ("make", "load", "change"),
    [
        (bert_files, load_text_encoder, {"num_hidden_layers": 10**9}),
        (bert_files, load_text_encoder, {"hidden_size": 2**20, "intermediate_size": 2**20}),
        (bert_files, load_text_encoder, {"vocab_size": 2**24}),
        (bert_files, load_text_encoder, {"vocab_size": 2**62}),
        (bert_files, load_text_encoder, {"num_attention_heads": 0}),
        (lambda folder: saved(kl(), folder), load_autoencoder, {"layers_per_block": 10**9}),
        (lambda folder: saved(kl(), folder), load_autoencoder, {"block_out_channels": [32, 2**20]}),
        (lambda folder: vision_folder(folder, "blip"), load_captioner, {"text_config": {"num_hidden_layers": 10**9}}),
        (lambda folder: vision_folder(folder, "blip"), load_captioner, {"text_config": {"hidden_size": 2**18}}),
        (clip_model, lambda folder: load_vision_model(folder, "embed"), {"vision_config": {"hidden_size": 2**18}}),
    ],
)
def test_a_model_larger_than_its_weights(
    make: Callable[[Path], Any], load: Callable[[Path], Any], change: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "stranger"
    make(folder)
    (path,) = folder.rglob("config.json")
    config = json.loads(path.read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises(ModelFilesError, match=r"stranger: .*config.* is damaged"):
        load(folder)


def test_configs_of_known_models_are_within_bounds() -> None:
    check_config({"block_out_channels": [128, 1024, 2048], "layers_per_block": 2, "max_position_embeddings": 10485760})
    check_config({"text_config": {"num_hidden_layers": 126, "vocab_size": 262208, "layer_types": ["full"] * 126}})
    check_config({"model_max_length": 10**30, "rope_theta": 10**9, "num_experts": 384, "vision_feature_layer": -2})
    with pytest.raises(ValueError, match="down_block_types has 2000 entries"):
        check_config({"down_block_types": ["x"] * 2000})
