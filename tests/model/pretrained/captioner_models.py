"""Tiny captioners with random weights, in the layout of the repositories that `model.pretrained.captioners` names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.model.pretrained.text_models import SENTENCES

FAMILIES = ("blip", "florence2", "llava", "internvl", "qwen2_5_vl", "qwen3_vl")
VOCABULARY = 400

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IMAGES = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>\n",
    "llava": "<image>\n",
}

SPECIAL = {
    "blip": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"],
    "florence2": ["<s>", "<pad>", "</s>", "<unk>", "<image>"],
    "llava": ["<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>"],
    "internvl": ["<pad>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
}

QWEN = ["<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
}

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def vision_folder(folder: Path, family: str, seed: int = 0, **sizes: int) -> str:
    """Write a captioner of a family, and its tokenizer and image processor; gives the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    known = SPECIAL.get(family, QWEN)
    ids = {token: i for i, token in enumerate(known)}
    _write_tokenizer(folder, family, known, ids)
    torch.manual_seed(seed)
    module, images = _MAKERS[family](ids, **sizes)
    for parameter in module.parameters():  # with weights as small as usual, what is said is the same of every image
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if family == "blip":  # one answer in three comes to its end within twelve tokens
        module.text_decoder.get_output_embeddings().bias.data[ids["[SEP]"]] = 4.0
    module.save_pretrained(folder)
    images.save_pretrained(folder)
    return str(folder)


def _write_tokenizer(folder: Path, family: str, known: list[str], ids: dict[str, int]) -> None:
    if family == "blip":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=known, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=known,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator([*SENTENCES, "user assistant"], trainer)
    if family == "blip":
        around = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    if family == "llava":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    tokenizer.save(str(folder / "tokenizer.json"))
    named: dict[str, dict[str, Any]] = {
        "blip": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "florence2": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"},
        "llava": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"},
        "internvl": {
            "eos_token": "<|im_end|>",
            "pad_token": "<pad>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    }
    options = named.get(family, {"eos_token": "<|im_end|>", "pad_token": "<pad>"})
    options = {**options, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    if family in IMAGES:
        template = CHAT.replace("IMAGE", IMAGES[family])
        if family == "llava":  # as older repositories have it
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        else:
            (folder / "chat_template.jinja").write_text(template)


def _blip(ids: dict[str, int]) -> tuple[Any, Any]:
    text = {**TEXT, "encoder_hidden_size": 32, "bos_token_id": ids["[DEC]"], "eos_token_id": 2, "sep_token_id": 3}
    text |= {"pad_token_id": 0, "max_position_embeddings": 96}
    config = BlipConfig(text_config=text, vision_config={**TOWER, "image_size": 32, "patch_size": 16})
    return BlipForConditionalGeneration(config), BlipImageProcessorPil(size={"height": 32, "width": 32})


def _florence2(ids: dict[str, int]) -> tuple[Any, Any]:
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 4],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
        "projection_dim": 32,
    }
    text = {"model_type": "bart", "vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 128}
    for side in ("encoder", "decoder"):
        text |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    text |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text["tie_word_embeddings"] = False
    config = Florence2Config(
        text_config=text, vision_config=vision, image_token_id=ids["<image>"], tie_word_embeddings=False
    )
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_seq_length=5)
    return Florence2ForConditionalGeneration(config), images


def _llava(ids: dict[str, int]) -> tuple[Any, Any]:
    text = {**TEXT, "model_type": "llama", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    vision = {**TOWER, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=ids["<image>"])
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaForConditionalGeneration(config), images


def _internvl(ids: dict[str, int]) -> tuple[Any, Any]:
    text = {**TEXT, "model_type": "qwen2", "eos_token_id": ids["<|im_end|>"], "pad_token_id": 0}
    vision = {**TOWER, "image_size": [32, 32], "patch_size": [8, 8]}
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4)
    return InternVLForConditionalGeneration(config), images


def _qwen2_5_vl(ids: dict[str, int]) -> tuple[Any, Any]:
    vision = QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 56}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "type": "default"}
    text = {**TEXT, "rope_scaling": rope, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids(ids))
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 84 * 84})
    return Qwen2_5_VLForConditionalGeneration(config), images


def _qwen3_vl(ids: dict[str, int], head_dim: int = 8) -> tuple[Any, Any]:
    vision = QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    rope: dict[str, Any] = {"rope_type": "default", "mrope_interleaved": True}
    rope["mrope_section"] = [head_dim // 4, head_dim // 8, head_dim // 8]
    text = {**TEXT, "head_dim": head_dim, "rope_scaling": rope, "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(ids))
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64 * 64, "longest_edge": 96 * 96},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VLForConditionalGeneration(config), images


def _qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {name: ids[f"<|{token}|>"] for name, token in names.items()}


_MAKERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "blip": _blip,
    "florence2": _florence2,
    "llava": _llava,
    "internvl": _internvl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
}
