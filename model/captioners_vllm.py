"""A captioner in vLLM, which makes its own batches of the requests that it is given: `pip install "microdit[vllm]"`.

NOT RUN YET: it was written for vLLM 0.11's `LLM.chat` on a machine that has no GPU, where vLLM does not install.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.captioners import Answer, fetch_captioner

NOT_THERE = ("blip", "florence2")  # in vLLM
MOST_TOKENS = 32768  # of a request; an image of 4096 pixels a side has up to 21,316. What there must be memory for
MEMORY = 0.9  # of the GPU, for weights and cache


class VllmModel:
    """What `model.captioners.VisionModel` is to the pipeline: `prepare` and `generate`."""

    def __init__(self, folder: Path, memory: float):
        from transformers import AutoConfig
        from vllm import LLM

        text = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        # one image of each request, and no room kept for videos
        self._llm: Any = LLM(
            model=str(folder),
            dtype="bfloat16",
            max_model_len=min(MOST_TOKENS, text.max_position_embeddings),
            limit_mm_per_prompt={"image": 1, "video": 0},
            gpu_memory_utilization=memory,
        )
        # of the model's own generation config vLLM takes by itself what ends an answer, and no more
        self._penalty: float = self._llm.get_default_sampling_params().repetition_penalty
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def prepare(self, pixels: np.ndarray) -> Image.Image:
        return Image.fromarray(pixels)

    def generate(
        self, pictures: Sequence[Any], prompt: str, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Answer]:
        from vllm import SamplingParams

        asked = [
            [{"role": "user", "content": [{"type": "image_pil", "image_pil": p}, {"type": "text", "text": prompt}]}]
            for p in pictures
        ]
        drawn = [
            SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed, repetition_penalty=self._penalty)
            for seed in seeds
        ]
        found = [request.outputs[0] for request in self._llm.chat(asked, drawn, use_tqdm=False)]
        return [Answer(one.text.strip(), one.finish_reason == "stop") for one in found]


def load_vllm(name_or_path: str | Path, *, revision: str | None = None, share: float = 1.0) -> VllmModel:
    """As `model.captioners.load_captioner`. `share`: of the GPU that it may have.

    Raises:
        ValueError: the model is of a family that vLLM does not have; and as `load_captioner`.
    """
    files, family = fetch_captioner(str(name_or_path), revision)
    if family in NOT_THERE:
        raise ValueError(f"engine 'vllm': it has no {family}; leave engine out")
    return VllmModel(files.folder, MEMORY * min(share, 1.0))
