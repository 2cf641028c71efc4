"""Tiny vision models of random weights, as transformers saves those of the hub."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from microdit.model.pretrained.clip import END, START, ClipTokenizer, read_merges
from tests.model.pretrained.text_models import bert_files, clip_files, with_norms

SIDE = 32
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXACT = {"height": SIDE, "width": SIDE}
LABELS = {0: "normal", 1: "nsfw", 2: "drawing"}


def clip_model(folder: Path) -> str:
    """openai/clip-vit-large-patch14: image and text tower, a tokenizer, and how images are prepared."""
    clip_files(folder)
    ClipTokenizer(read_merges(folder, 49408)).save(folder)
    vocabulary = (folder / "vocab.json").read_text()
    for ours, theirs in ((START, "<|startoftext|>"), (END, "<|endoftext|>")):
        vocabulary = vocabulary.replace(f'"{ours}"', f'"{theirs}"')
    (folder / "vocab.json").write_text(vocabulary)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def siglip_model(folder: Path) -> str:
    """google/siglip-base-patch16-224, with another tokenizer."""
    bert_files(folder)
    for file in ("model.safetensors", "config.json"):
        (folder / file).unlink()
    torch.manual_seed(1)
    text = {**SIZES, "intermediate_size": 48, "vocab_size": 200, "max_position_embeddings": 12, "pad_token_id": 1}
    vision = {**SIZES, "intermediate_size": 48, "image_size": SIDE, "patch_size": 8}
    with_norms(SiglipModel(SiglipConfig(text_config=text, vision_config=vision))).save_pretrained(folder)
    SiglipImageProcessorPil(size=EXACT).save_pretrained(folder)
    return str(folder)


def dino_model(folder: Path) -> str:
    """facebook/dinov2-base."""
    torch.manual_seed(2)
    with_norms(Dinov2Model(Dinov2Config(image_size=SIDE, patch_size=8, **SIZES))).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=EXACT).save_pretrained(folder)
    return str(folder)


def classifier(folder: Path, labels: dict[int, str] = LABELS) -> str:
    """Falconsai/nsfw_image_detection: a ViT without a pooler; each label once."""
    torch.manual_seed(3)
    config = ViTConfig(image_size=SIDE, patch_size=8, intermediate_size=48, id2label=labels, **SIZES)
    with_norms(ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessorPil(size=EXACT).save_pretrained(folder)
    return str(folder)


def aesthetic_model(folder: Path, kind: str = "Linear") -> str:
    """shunk031's predictors: a CLIP image tower and `layers`, and a class of their own that is never run."""
    torch.manual_seed(4)
    config = CLIPVisionConfig(image_size=SIDE, patch_size=8, intermediate_size=48, projection_dim=24, **SIZES)
    with_norms(CLIPVisionModelWithProjection(config)).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for number, (wide, narrow) in zip((0, 2, 4), ((24, 16), (16, 8), (8, 1)), strict=True):
        weights[f"layers.{number}.weight"], weights[f"layers.{number}.bias"] = (
            torch.randn(narrow, wide),
            torch.randn(narrow),
        )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    about = json.loads((folder / "config.json").read_text())
    name = f"AestheticsPredictorV2{kind}"
    about |= {"architectures": [name], "auto_map": {"AutoModel": f"modeling_v2.{name}"}, "model_type": "predictor"}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "modeling_v2.py").write_text("raise SystemExit('code of the hub was run')")
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=EXACT).save_pretrained(folder)
    return str(folder)
