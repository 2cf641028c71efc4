"""A captioner in vLLM, which makes its own batches of requests: `pip install "microdit[vllm]"`.

vLLM prepares the images itself, and computes in a process of its own while the next ones are prepared.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from microdit.model.pretrained.captioners import CaptionAnswer, fetch_captioner

NOT_THERE = ("blip", "florence2")  # in vLLM
MOST_TOKENS = 32768  # of a request; an image of 4096 pixels a side has up to 21,316. What there must be memory for
MEMORY = 0.9  # of the GPU, for weights and cache


class VllmModel:
    """A captioner with the methods `prepare` and `generate` of `captioners.CaptionModel`. Made by `load_vllm`."""

    def __init__(self, folder: Path, memory: float):
        self._folder, self._memory = folder, memory
        self._llm: Any = None
        self._start()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _start(self) -> None:
        from transformers import AutoConfig
        from vllm import LLM

        others = set(multiprocessing.active_children())
        text = AutoConfig.from_pretrained(
            self._folder, local_files_only=True, trust_remote_code=False
        ).get_text_config()
        self._llm = LLM(
            model=str(self._folder),
            dtype="bfloat16",
            max_model_len=min(MOST_TOKENS, text.max_position_embeddings),
            limit_mm_per_prompt={"image": 1, "video": 0},  # no room is kept for videos
            gpu_memory_utilization=self._memory,
        )
        self._engine = set(multiprocessing.active_children()) - others
        # of the model's own generation config vLLM takes by itself what ends an answer, and no more
        self._penalty: float = self._llm.get_default_sampling_params().repetition_penalty

    def prepare(self, pixels: np.ndarray) -> Image.Image:
        return Image.fromarray(pixels)

    def generate(
        self, pictures: Sequence[Image.Image], prompt: str, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[CaptionAnswer]:
        """Answer a prompt, as `CaptionModel.generate`.

        Raises:
            torch.AcceleratorError: vLLM's process died meanwhile. The next call starts another one.
        """
        from vllm import SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        asked = [
            [{"role": "user", "content": [{"type": "image_pil", "image_pil": p}, {"type": "text", "text": prompt}]}]
            for p in pictures
        ]
        drawn = [
            SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed, repetition_penalty=self._penalty)
            for seed in seeds
        ]
        if self._llm is None or not all(process.is_alive() for process in self._engine):
            self._start()  # if it died between two calls, vLLM may wait for it for ever
        try:
            written = [request.outputs[0] for request in self._llm.chat(asked, drawn, use_tqdm=False)]
        except EngineDeadError as error:
            self._llm = None
            raise torch.AcceleratorError(f"vLLM's process died: {error}") from error
        return [CaptionAnswer(one.text.strip(), one.finish_reason == "stop") for one in written]


def load_vllm(name_or_path: str | Path, *, revision: str | None = None, share: float = 1.0) -> VllmModel:
    """Load a captioner, as `captioners.load_captioner`. share: of the GPU's memory that it may have.

    Raises:
        ValueError: the model is of a family that vLLM does not have; and as `load_captioner`.
    """
    files, family = fetch_captioner(str(name_or_path), revision)
    if family in NOT_THERE:
        raise ValueError(f"engine 'vllm': it has no {family}; leave engine out")
    return VllmModel(files.folder, MEMORY * min(share, 1.0))
