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


class VllmModel:
    """What `model.captioners.VisionModel` is to the pipeline: `prepare` and `generate`."""

    device = torch.device("cuda")

    def __init__(self, folder: Path):
        from vllm import LLM

        # one image of each request, and no room kept for videos
        self._llm: Any = LLM(model=str(folder), dtype="bfloat16", limit_mm_per_prompt={"image": 1, "video": 0})

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
        drawn = [SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed) for seed in seeds]
        found = [request.outputs[0] for request in self._llm.chat(asked, drawn, use_tqdm=False)]
        return [Answer(one.text.strip(), one.finish_reason == "stop") for one in found]


def load_vllm(name_or_path: str | Path, *, revision: str | None = None) -> VllmModel:
    """As `model.captioners.load_captioner`.

    Raises:
        ValueError: the model is of a family that vLLM does not have; and as `load_captioner`.
    """
    files, family = fetch_captioner(str(name_or_path), revision)
    if family in NOT_THERE:
        raise ValueError(f"engine 'vllm': it has no {family}; leave engine out")
    return VllmModel(files.folder)
