"""Prompts that were encoded before, in place of a text encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from microdit.model.pretrained.text import TextEncoder


class EncodedPrompts:
    """Stands for a text encoder that has encoded the prompts and is gone: it may be larger than the network."""

    def __init__(self, encoder: TextEncoder, prompts: Sequence[str]):
        self.name, self.width, self.device = encoder.name, encoder.width, encoder.device
        encoded = {prompt: encoder.encode([prompt]) for prompt in prompts}
        self._encoded = {prompt: (text.cpu(), lengths.cpu()) for prompt, (text, lengths) in encoded.items()}

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        (text,) = texts
        embeddings, lengths = self._encoded[text]
        return embeddings.to(self.device), lengths

    def to(self, device: str | torch.device) -> "EncodedPrompts":
        self.device = torch.device(device)
        return self
