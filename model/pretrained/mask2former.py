"""Detect objects with the Mask2Former of GenEval: mmdet's checkpoint in transformers' network.

    mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth

The network is the same (Cheng et al., arXiv 2112.01527), its weights have other names, and two of them another order:
mmdet's patch merging takes the four neighbours channel by channel, transformers' neighbour by neighbour. What becomes
of the outputs is mmdet's: transformers' own post-processing gives other scores and boxes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from microdit.model.pretrained.hub import ModelFilesError, file_sha256, reason

DIGEST = "743b7d99"  # how the SHA-256 of the file begins
LONG, SHORT, MULTIPLE = 1333, 800, 32  # pixels: a picture is scaled to fit in, and padded to a multiple
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MOST = 100  # detections of a picture
NEIGHBOURS = (0, 2, 1, 3)  # transformers' order of the four, in mmdet's numbers
HEAD, BACKBONE = "panoptic_head.", "backbone."

# names of mmdet, and those of transformers; {} stands for numbers, in their order
SWIN = "model.pixel_level_module.encoder.swin."
PIXELS = "model.pixel_level_module.decoder."
QUERIES = "model.transformer_module."
NAMES = {
    "backbone.patch_embed.projection": SWIN + "embeddings.patch_embeddings.projection",
    "backbone.patch_embed.norm": SWIN + "embeddings.norm",
    "backbone.stages.{}.blocks.{}.norm1": SWIN + "encoder.layers.{}.blocks.{}.layernorm_before",
    "backbone.stages.{}.blocks.{}.norm2": SWIN + "encoder.layers.{}.blocks.{}.layernorm_after",
    "backbone.stages.{}.blocks.{}.attn.w_msa.proj": SWIN + "encoder.layers.{}.blocks.{}.attention.o_proj",
    "backbone.stages.{}.blocks.{}.ffn.layers.0.0": SWIN + "encoder.layers.{}.blocks.{}.mlp.fc1",
    "backbone.stages.{}.blocks.{}.ffn.layers.1": SWIN + "encoder.layers.{}.blocks.{}.mlp.fc2",
    "backbone.stages.{}.downsample.norm": SWIN + "encoder.layers.{}.downsample.norm",
    "backbone.stages.{}.downsample.reduction": SWIN + "encoder.layers.{}.downsample.reduction",
    "panoptic_head.pixel_decoder.input_convs.{}.conv": PIXELS + "input_projections.{}.0",
    "panoptic_head.pixel_decoder.input_convs.{}.gn": PIXELS + "input_projections.{}.1",
    "panoptic_head.pixel_decoder.encoder.layers.{}.attentions.0.sampling_offsets": PIXELS
    + "encoder.layers.{}.self_attn.sampling_offsets",
    "panoptic_head.pixel_decoder.encoder.layers.{}.attentions.0.attention_weights": PIXELS
    + "encoder.layers.{}.self_attn.attention_weights",
    "panoptic_head.pixel_decoder.encoder.layers.{}.attentions.0.value_proj": PIXELS
    + "encoder.layers.{}.self_attn.value_proj",
    "panoptic_head.pixel_decoder.encoder.layers.{}.attentions.0.output_proj": PIXELS
    + "encoder.layers.{}.self_attn.output_proj",
    "panoptic_head.pixel_decoder.encoder.layers.{}.norms.0": PIXELS + "encoder.layers.{}.self_attn_layer_norm",
    "panoptic_head.pixel_decoder.encoder.layers.{}.norms.1": PIXELS + "encoder.layers.{}.final_layer_norm",
    "panoptic_head.pixel_decoder.encoder.layers.{}.ffns.0.layers.0.0": PIXELS + "encoder.layers.{}.fc1",
    "panoptic_head.pixel_decoder.encoder.layers.{}.ffns.0.layers.1": PIXELS + "encoder.layers.{}.fc2",
    "panoptic_head.pixel_decoder.lateral_convs.0.conv": PIXELS + "adapter_1.0",
    "panoptic_head.pixel_decoder.lateral_convs.0.gn": PIXELS + "adapter_1.1",
    "panoptic_head.pixel_decoder.output_convs.0.conv": PIXELS + "layer_1.0",
    "panoptic_head.pixel_decoder.output_convs.0.gn": PIXELS + "layer_1.1",
    "panoptic_head.pixel_decoder.mask_feature": PIXELS + "mask_projection",
    "panoptic_head.query_embed": QUERIES + "queries_embedder",
    "panoptic_head.query_feat": QUERIES + "queries_features",
    "panoptic_head.transformer_decoder.layers.{}.attentions.0.attn.out_proj": QUERIES
    + "decoder.layers.{}.cross_attn.out_proj",
    "panoptic_head.transformer_decoder.layers.{}.attentions.1.attn.out_proj": QUERIES
    + "decoder.layers.{}.self_attn.out_proj",
    "panoptic_head.transformer_decoder.layers.{}.norms.0": QUERIES + "decoder.layers.{}.cross_attn_layer_norm",
    "panoptic_head.transformer_decoder.layers.{}.norms.1": QUERIES + "decoder.layers.{}.self_attn_layer_norm",
    "panoptic_head.transformer_decoder.layers.{}.norms.2": QUERIES + "decoder.layers.{}.final_layer_norm",
    "panoptic_head.transformer_decoder.layers.{}.ffns.0.layers.0.0": QUERIES + "decoder.layers.{}.fc1",
    "panoptic_head.transformer_decoder.layers.{}.ffns.0.layers.1": QUERIES + "decoder.layers.{}.fc2",
    "panoptic_head.transformer_decoder.post_norm": QUERIES + "decoder.layernorm",
    "panoptic_head.cls_embed": "class_predictor",
    **{
        f"panoptic_head.mask_embed.{2 * number}": QUERIES + f"decoder.mask_predictor.mask_embedder.{number}.0"
        for number in range(3)
    },
}
WHOLE = {  # names that are no prefix of .weight and .bias
    "backbone.stages.{}.blocks.{}.attn.w_msa.relative_position_bias_table": SWIN
    + "encoder.layers.{}.blocks.{}.attention.relative_position_bias.relative_position_bias_table",
    "panoptic_head.pixel_decoder.level_encoding.weight": PIXELS + "level_embed",
    "panoptic_head.level_embed.weight": QUERIES + "level_embed.weight",
    "panoptic_head.transformer_decoder.layers.{}.attentions.0.attn.in_proj_weight": QUERIES
    + "decoder.layers.{}.cross_attn.in_proj_weight",
    "panoptic_head.transformer_decoder.layers.{}.attentions.0.attn.in_proj_bias": QUERIES
    + "decoder.layers.{}.cross_attn.in_proj_bias",
}
SPLIT = {  # queries, keys and values in one
    "backbone.stages.{}.blocks.{}.attn.w_msa.qkv.": SWIN + "encoder.layers.{}.blocks.{}.attention.",
    "panoptic_head.transformer_decoder.layers.{}.attentions.1.attn.in_proj_": QUERIES + "decoder.layers.{}.self_attn.",
}
STAGES = re.compile(r"backbone\.norm([0-3])\.(weight|bias)")
COMPUTED = re.compile(r".*\.relative_position_index")  # constants of mmdet's modules
MADE = re.compile(
    r"criterion\.empty_weight|.*swin\.layernorm\.(weight|bias)"
)  # transformers' that no output depends on


def converted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reorder the weights of mmdet's Mask2Former to those of transformers.

    Raises:
        ModelFilesError: a name is not known.
    """
    known = [(_pattern(old, r"\.(weight|bias)"), f"{new}.{{}}") for old, new in NAMES.items()]
    known += [(_pattern(old), new) for old, new in WHOLE.items()]
    parts = [(_pattern(old, "(weight|bias)"), new) for old, new in SPLIT.items()]
    result: dict[str, Tensor] = {}
    for name, value in weights.items():
        if COMPUTED.fullmatch(name):
            continue
        if stage := STAGES.fullmatch(name):
            number = int(stage[1]) + 1
            result[f"model.pixel_level_module.encoder.hidden_states_norms.stage{number}.{stage[2]}"] = value
        elif found := next(((match, new) for old, new in parts if (match := old.fullmatch(name))), None):
            match, new = found
            *numbers, kind = match.groups()
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                result[f"{new.format(*numbers)}{part}_proj.{kind}"] = tensor
        elif found := next(((match, new) for old, new in known if (match := old.fullmatch(name))), None):
            match, new = found
            result[new.format(*match.groups())] = _by_neighbours(value) if ".downsample." in name else value
        else:
            raise ModelFilesError(f"mmdet's Mask2Former: the weight {name!r} is not known; expected {BACKBONE}, {HEAD}")
    return result


def _pattern(name: str, end: str = "") -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)") + end)


def _by_neighbours(value: Tensor) -> Tensor:
    """Order the last axis, channel by channel with four neighbours each, neighbour by neighbour."""
    channels = value.shape[-1] // 4
    grouped = value.reshape(*value.shape[:-1], channels, 4)[..., NEIGHBOURS]
    return grouped.transpose(-1, -2).reshape(value.shape).contiguous()


def network_of(weights: Mapping[str, Tensor], heads: tuple[int, ...] = (3, 6, 12, 24), attention_heads: int = 8) -> Any:
    """Build transformers' Mask2Former of mmdet's weights, whose shapes say all but the numbers of heads.

    Raises:
        ModelFilesError: names or shapes do not fit.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    def count(pattern: str) -> int:
        return 1 + max((int(match[1]) for name in weights if (match := re.match(pattern, name))), default=-1)

    try:
        hidden = weights[HEAD + "query_feat.weight"].shape
        swin = SwinConfig(
            embed_dim=weights[BACKBONE + "patch_embed.norm.weight"].shape[0],
            depths=[count(rf"backbone\.stages\.{stage}\.blocks\.(\d+)") for stage in range(4)],
            num_heads=[*heads],
            window_size=7,
            image_size=224,
            out_features=[f"stage{number}" for number in range(1, 5)],
        )
        config = Mask2FormerConfig(
            backbone_config=swin,
            num_labels=weights[HEAD + "cls_embed.weight"].shape[0] - 1,
            hidden_dim=hidden[1],
            feature_size=hidden[1],
            mask_feature_size=weights[HEAD + "pixel_decoder.mask_feature.weight"].shape[0],
            num_queries=hidden[0],
            encoder_layers=count(r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)"),
            decoder_layers=1 + count(r"panoptic_head\.transformer_decoder\.layers\.(\d+)"),
            encoder_feedforward_dim=_rows(weights, "pixel_decoder.encoder"),
            dim_feedforward=_rows(weights, "transformer_decoder"),
            num_attention_heads=attention_heads,
        )
        network: Any = Mask2FormerForUniversalSegmentation(config)
        report = network.load_state_dict(converted(weights), strict=False)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelFilesError(f"mmdet's Mask2Former: {' '.join(str(error).split())[:300]}") from error
    if lacking := [name for name in report.missing_keys if not MADE.fullmatch(name)]:
        raise ModelFilesError(f"mmdet's Mask2Former: it lacks {len(lacking)} weights, the first {lacking[0]}")
    return network.eval().requires_grad_(False)


def _rows(weights: Mapping[str, Tensor], part: str) -> int:
    return weights[f"{HEAD}{part}.layers.0.ffns.0.layers.0.0.weight"].shape[0]


@dataclass(frozen=True)
class DetectedObject:
    """An object: the number of its class, its score, its box (x1, y1, x2, y2) and its mask, bool (H, W)."""

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


class ObjectDetector:
    """mmdet's Mask2Former with its own preparation and post-processing."""

    def __init__(self, network: Any, device: str | torch.device = "cpu"):
        self._network = network.to(device)

    @torch.inference_mode()
    def detect(self, pixels: np.ndarray) -> list[DetectedObject]:
        """Find the objects of a picture, uint8 (H, W, 3): at most 100, the highest class scores first."""
        batch, size = prepared(pixels)
        output = self._network(pixel_values=batch.to(self._network.device))
        masks = functional.interpolate(
            output.masks_queries_logits.float(), batch.shape[-2:], mode="bilinear", align_corners=False
        )[..., : size[0], : size[1]]
        masks = functional.interpolate(masks, pixels.shape[:2], mode="bilinear", align_corners=False)[0]
        return list(objects_of(output.class_queries_logits[0].float(), masks))


def prepared(pixels: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """Scale, normalise and pad a picture: float32 (1, 3, h, w), and its height and width without the padding.

    OpenCV's bilinear scaling, which mmdet uses, rounds to 8 bits; this does within one of 255 levels.
    """
    height, width = pixels.shape[:2]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    picture = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float()
    picture = functional.interpolate(picture, size, mode="bilinear", align_corners=False).round()
    mean, deviation = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    below, right = (-side % MULTIPLE for side in size)
    return functional.pad((picture - mean) / deviation, (0, right, 0, below)), size


def objects_of(classes: Tensor, masks: Tensor) -> Iterator[DetectedObject]:
    """Find the objects of class logits (Q, C + 1), whose last class is none, and mask logits (Q, H, W).

    An object is a query and a class. Its score is the class' probability by the mean probability of its mask.
    """
    scores = classes.softmax(-1)[:, :-1]
    best = scores.flatten().topk(min(MOST, scores.numel()))
    for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        query, label = divmod(place, scores.shape[1])
        mask = masks[query] > 0
        inside = (masks[query].sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
        box = (0.0, 0.0, 0.0, 0.0)
        if len(rows):
            box = (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)
        yield DetectedObject(label, score * float(inside), box, mask.cpu().numpy())


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> ObjectDetector:
    """Load the detector of GenEval from mmdet's file.

    Raises:
        ModelFilesError: there is no such file, or it is another one.
    """
    file = Path(path).expanduser()
    digest = file_sha256(file, "GenEval's detector")
    try:
        if not digest.startswith(DIGEST):
            raise ModelFilesError(
                f"GenEval's detector {file}: its SHA-256 begins with {digest[:8]}; expected {DIGEST}, mmdet's "
                "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
            )
        weights = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    except (OSError, KeyError, RuntimeError, EOFError, ValueError) as error:
        raise ModelFilesError(f"GenEval's detector {file}: {reason(error)}") from error
    return ObjectDetector(network_of(weights), device)
