"""Image towers that evaluations take features from: CLIP and DINOv2 through transformers, in float32.

`microdit.model.pretrained.vision` has the models that score a corpus: in half precision, and with features of unit
length. Figures that people compare are of float32, and some of features as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microdit.model.pretrained.hub import ModelFiles, ModelFilesError, fetch
from microdit.model.pretrained.text_registry import TOKENIZER
from microdit.model.pretrained.vision import CONFIGS, WEIGHTS, load_module, pooled_features

TOKENS = 77  # that CLIP's text tower reads; what is behind them is cut off


class FeatureTower(torch.nn.Module):
    """Features of prepared pictures (B, 3, h, w), and of captions where there is a text tower.

    Of a CLIP the projected features in which pictures and captions compare, of others the class token after the last
    norm; neither is scaled to unit length.
    """

    def __init__(self, module: Any, files: ModelFiles, tokenizer: Any = None):
        super().__init__()
        self.module, self.origin, self._tokenizer = module, files.origin(*CONFIGS, *files.weights), tokenizer
        vision = getattr(module.config, "vision_config", module.config)
        self.side = int(vision.image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        if hasattr(self.module, "get_image_features"):
            return pooled_features(self.module.get_image_features(pixel_values=pixels))
        features: Tensor = self.module(pixel_values=pixels).last_hidden_state[:, 0]
        return features

    @torch.inference_mode()
    def read(self, captions: Sequence[str]) -> np.ndarray:
        """Compute float32 (B, width) features of captions."""
        length = min(TOKENS, int(self.module.config.text_config.max_position_embeddings))
        tokens = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.module.device)
        return pooled_features(self.module.get_text_features(**dict(tokens))).float().cpu().numpy()


def load_feature_tower(
    name_or_path: str | Path, *, revision: str | None = None, captions: bool = False, device: str | torch.device = "cpu"
) -> FeatureTower:
    """Load a tower of a hub repository (`owner/name`) or a folder.

    Args:
        captions: load the tokenizer, too; the model must be a CLIP.

    Raises:
        ModelFilesError: its files cannot be had, or it is no such model.
        ValueError: there is no such name.
    """
    from transformers import AutoModel, AutoTokenizer

    name = str(name_or_path)
    patterns = [*CONFIGS, *(TOKENIZER if captions else ())]
    files = fetch(name, patterns, weights=WEIGHTS, revision=revision)
    module: Any = load_module(files, AutoModel, torch.float32, may_lack="pooler.")[0]
    if captions and not hasattr(module, "get_text_features"):
        raise ModelFilesError(f"{name}: it has no text tower beside that for pictures; expected a CLIP")
    asked: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with files.own_code_refused():
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **asked) if captions else None
    return FeatureTower(module.to(device).eval().requires_grad_(False), files, tokenizer)
