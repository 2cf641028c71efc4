"""Images to captions: transformers' vision-language models by name, hub repository or folder.

    pixels (H, W, 3) --image processor--> Picture --prompt around it, left padding--> ids (B, L) --generate--> Answers

The image processors are the `...Pil` ones, and the text around an image's tokens is laid out here: transformers' own
processors of Qwen-VL and InternVL want torchvision, for videos. What they would make is the same, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from microdit.model.pretrained.hub import Fingerprint, ModelFiles, ModelFilesError, fetch, require


@dataclass(frozen=True)
class CaptionerEntry:
    """The repository or folder of a captioner, and its commit (None: the newest of `main`)."""

    where: str
    revision: str | None = None


CAPTIONERS = {
    "qwen3-vl-2b": CaptionerEntry("Qwen/Qwen3-VL-2B-Instruct"),
    "qwen3-vl-4b": CaptionerEntry("Qwen/Qwen3-VL-4B-Instruct"),
    "qwen3-vl-8b": CaptionerEntry("Qwen/Qwen3-VL-8B-Instruct"),
    "qwen2.5-vl-3b": CaptionerEntry("Qwen/Qwen2.5-VL-3B-Instruct"),
    "qwen2.5-vl-7b": CaptionerEntry("Qwen/Qwen2.5-VL-7B-Instruct"),
    "florence-2-base": CaptionerEntry("florence-community/Florence-2-base"),
    "florence-2-large": CaptionerEntry("florence-community/Florence-2-large"),
    "internvl3-1b": CaptionerEntry("OpenGVLab/InternVL3-1B-hf"),
    "internvl3-8b": CaptionerEntry("OpenGVLab/InternVL3-8B-hf"),
    "blip-base": CaptionerEntry("Salesforce/blip-image-captioning-base"),
    "blip-large": CaptionerEntry("Salesforce/blip-image-captioning-large"),
    "llava-1.5-7b": CaptionerEntry("llava-hf/llava-1.5-7b-hf"),
}

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
FAMILIES = (*QWEN, "internvl", "llava", "florence2", "blip")
"""The `model_type` of what can be loaded. A LLaVA-NeXT is another kind, and is not among them."""


CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")
IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")

TEXTS = (
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip

WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
)

KEPT = (  # of a model's generation config: its tokens, and what keeps it from repeating itself
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "repetition_penalty", "no_repeat_ngram_size",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """An image prepared for the model: the image processor's tensors, and how many tokens stand for it in a prompt."""

    tensors: Mapping[str, Tensor]
    tokens: int


@dataclass(frozen=True)
class CaptionAnswer:
    """The text that a model wrote. `finished`: it ended by itself, and was not cut at `max_tokens`."""

    text: str
    finished: bool


class CaptionModel:
    """A loaded captioner. Made by `load_captioner`.

    Attributes:
        module: transformers' network.
        fingerprint: identifies its numbers: files, family and dtype, as `captioner_fingerprint` gives them.
    """

    def __init__(self, module: Any, tokenizer: Any, images: Any, files: ModelFiles, fingerprint: Fingerprint):
        from transformers import GenerationConfig

        self.fingerprint, self.family = fingerprint, fingerprint["family"]
        self.module, self._tokenizer, self._images = module, tokenizer, images
        self._template = _chat_template(files)
        self._options = files.read_json("processor_config.json") if files.matching("processor_config.json") else {}
        self._layouts: dict[str, list[int]] = {}
        config = module.config
        self._image_id = -1 if self.family == "blip" else int(config.image_token_id)
        known = [getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), 0]
        self._pad = next(token for token in known if token is not None)
        writer = module.text_decoder if self.family == "blip" else module
        own = writer.generation_config.to_dict()
        kept = {name: own[name] for name in KEPT if own.get(name) is not None}
        # without the rest of it: beams, sampling, an end that is forced on what is cut off
        writer.generation_config = GenerationConfig(**{"pad_token_id": self._pad, **kept})
        ends: Any = config.text_config.sep_token_id if self.family == "blip" else kept.get("eos_token_id")
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = set(ends if isinstance(ends, list) else [ends])

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.device
        return device

    def prepare(self, pixels: np.ndarray) -> Picture:
        """Prepare (H, W, 3) uint8 for the model. Safe to call in many threads at once."""
        more = {"crop_to_patches": True} if self.family == "internvl" else {}
        prepared = self._images(images=[pixels], return_tensors="pt", input_data_format="channels_last", **more)
        tensors = {name: value for name, value in prepared.items() if name in ("pixel_values", "image_grid_thw")}
        return Picture(tensors, self._tokens(prepared))

    def _tokens(self, prepared: Any) -> int:
        """Count the tokens of the prompt that stand for an image."""
        if self.family in QWEN:
            return int(prepared["image_grid_thw"].prod()) // self._images.merge_size**2
        if self.family == "internvl":
            return int(self.module.config.image_seq_length) * len(prepared["pixel_values"])
        if self.family == "florence2":
            return int(self._images.image_seq_length)
        if self.family == "llava":
            config = self.module.config
            side = int(self._options.get("patch_size") or config.vision_config.patch_size)
            height, width = prepared["pixel_values"].shape[-2:]
            strategy = self._options.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
            # a CLIP tower has a class token in front, which most leave out
            classes = self._options.get("num_additional_image_tokens", int(strategy == "default"))
            return (height // side) * (width // side) + int(classes) - int(strategy == "default")
        return 0  # BLIP attends to its image from outside of the text

    @torch.inference_mode()
    def generate(
        self, pictures: Sequence[Picture], prompt: str, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[CaptionAnswer]:
        """Answer `prompt` for each picture, with at most `max_tokens` tokens.

        With a temperature above 0 each answer is sampled with its own seed, and depends on the rest of the batch
        through rounding alone.
        """
        inputs = self.collate(pictures, prompt)
        draw = [] if not temperature else [_TokenDraw(temperature, _uniform(seeds, max_tokens).to(self.device))]
        written = self.module.generate(**inputs, logits_processor=draw, max_new_tokens=max_tokens, do_sample=False)
        return self.answers(written, inputs)

    def collate(self, pictures: Sequence[Picture], prompt: str) -> dict[str, Tensor]:
        """Make the inputs of the network's `generate` for pictures and a prompt, on its device."""
        rows = [self.ids(prompt, picture.tokens) for picture in pictures]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self._pad)
        for i, row in enumerate(rows):  # padded on the left: what is generated begins at the same index
            ids[i, longest - len(row) :] = torch.tensor(row)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.family in QWEN:
            inputs["mm_token_type_ids"] = (ids == self._image_id).int()
        for name in pictures[0].tensors:
            inputs[name] = torch.cat([picture.tensors[name] for picture in pictures])
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        return inputs | {"pixel_values": inputs["pixel_values"].to(self.module.dtype)}

    def answers(self, written: Tensor, inputs: Mapping[str, Tensor]) -> list[CaptionAnswer]:
        """Decode the token ids that `generate` gave for these inputs."""
        begin = inputs["input_ids"].shape[1] if self.family not in ("florence2", "blip") else 1
        return [self._answer(row[begin:].tolist()) for row in written.cpu()]

    def ids(self, prompt: str, tokens: int) -> list[int]:
        """Tokenize a prompt and an image that has so many tokens.

        Raises:
            ValueError: the prompt holds the very token that stands for an image.
        """
        if prompt not in self._layouts:
            text, more = self._laid_out(prompt)
            layout = self._tokenizer(text, add_special_tokens=more)["input_ids"]
            if self.family != "blip" and layout.count(self._image_id) != 1:
                raise ValueError(f"prompt {prompt!r}: it must not hold the model's token for an image")
            self._layouts[prompt] = list(layout)
        layout = self._layouts[prompt]
        if self.family == "blip":
            return layout
        at = layout.index(self._image_id)
        return [*layout[:at], *[self._image_id] * tokens, *layout[at + 1 :]]

    def _laid_out(self, prompt: str) -> tuple[str, bool]:
        """Lay a prompt out with one token for the image; the flag says if the tokenizer shall add special tokens."""
        tokenizer = self._tokenizer
        if self.family == "blip":
            return prompt, True
        image = tokenizer.convert_ids_to_tokens(self._image_id)
        if self.family == "florence2":
            return f"{image}{tokenizer.bos_token}{prompt}{tokenizer.eos_token}", False
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text = tokenizer.apply_chat_template(
            [message], chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        if self.family == "internvl":
            begin, end = (getattr(tokenizer, f"{which}_image_token") for which in ("start", "end"))
            text = text.replace(image, f"{begin}{image}{end}")
        begins = getattr(tokenizer, "bos_token", None)
        return text, not (begins and text.startswith(begins))

    def _answer(self, tokens: list[int]) -> CaptionAnswer:
        ends = [i for i, token in enumerate(tokens) if token in self._ends]
        kept = tokens[: ends[0]] if ends else tokens
        text = self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return CaptionAnswer(text.strip(), bool(ends))


class _TokenDraw:
    """Sample one token a row: leave the logit where the row's own uniform number falls in its distribution."""

    def __init__(self, temperature: float, uniform: Tensor):
        self._temperature, self._uniform = temperature, uniform
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        reached = torch.softmax(scores.double() / self._temperature, -1).cumsum(-1)
        wanted = self._uniform[:, self._step, None] * reached[:, -1:]
        self._step += 1
        chosen = torch.searchsorted(reached, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def _uniform(seeds: Sequence[int], steps: int) -> Tensor:
    """Draw (B, steps) float64 in [0, 1), the same on every device."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(steps) for seed in seeds]))


def load_captioner(
    name_or_path: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu"
) -> CaptionModel:
    """Load a captioner of `CAPTIONERS`, or any model of `FAMILIES` by repository or folder; runs no code of it.

    Raises:
        ValueError: there is no such name, or it is of another kind.
        microdit.model.pretrained.hub.ModelFilesError: its files cannot be had.
    """
    files, family = fetch_captioner(str(name_or_path), revision)
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar for each loading of each worker helps nobody
    module = _load(files, AutoModelForImageTextToText, dtype_of(family))
    try:
        with files.own_code_refused():
            tokenizer = AutoTokenizer.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
            # not torchvision's where there is one: a corpus can be made on several machines
            images = AutoImageProcessor.from_pretrained(
                files.folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{files.name}: its tokenizer or image processor cannot be loaded: {error}") from error
    module = module.to(device).eval().requires_grad_(False)
    return CaptionModel(module, tokenizer, images, files, _fingerprint(files, family))


def fetch_captioner(name: str, revision: str | None) -> tuple[ModelFiles, str]:
    """Fetch all files of a captioner, and tell its family. Raises as `load_captioner`."""
    files, family = _whole(name, revision)
    where = files.folder if files.revision is None else files.name
    return fetch(where, [*CONFIGS, *TEXTS], weights=WEIGHTS, revision=files.revision), family


def captioner_fingerprint(name_or_path: str | Path, *, revision: str | None = None) -> Fingerprint:
    """Give the fingerprint of `load_captioner(...)` from its files: of a repository only the config is fetched.

    Raises:
        As `load_captioner`, but for files that are damaged.
    """
    return _fingerprint(*_whole(str(name_or_path), revision))


def dtype_of(family: str) -> torch.dtype:
    """Choose the dtype of a family, the same on every machine. BLIP's small text decoder is kept in float32."""
    return torch.float32 if family == "blip" else torch.bfloat16


def _find(name: str, revision: str | None) -> tuple[ModelFiles, str]:
    entry = CAPTIONERS.get(name) or CaptionerEntry(name)
    try:
        files = fetch(entry.where, CONFIGS, revision=revision or entry.revision)
    except ValueError as error:
        raise ValueError(f"captioner {error}; named ones are {', '.join(CAPTIONERS)}") from error
    family = files.read_json("config.json").get("model_type") if files.matching("config.json") else None
    if family not in FAMILIES:
        raise ValueError(f"captioner {name!r}: model_type {family!r} is none of {', '.join(FAMILIES)}")
    return files, str(family)


def _whole(name: str, revision: str | None) -> tuple[ModelFiles, str]:
    """Fetch the config files of a captioner, check that no file is missing, and tell its family."""
    files, family = _find(name, revision)
    # without a vocabulary transformers would go on with an empty one
    require(files, IMAGE_PROCESSORS, VOCABULARIES, weights=WEIGHTS)
    return files, family


def _fingerprint(files: ModelFiles, family: str) -> Fingerprint:
    origin = files.origin(*CONFIGS, *TEXTS, *(file for group in WEIGHTS for file in group))
    return {**origin, "family": family, "dtype": str(dtype_of(family)).removeprefix("torch.")}


def _chat_template(files: ModelFiles) -> str | None:
    """Read the processor's chat template; None: the tokenizer's own."""
    if files.matching("chat_template.jinja"):
        return (files.folder / "chat_template.jinja").read_text(encoding="utf-8")
    if files.matching("chat_template.json"):
        return str(files.read_json("chat_template.json")["chat_template"])
    return None


def _load(files: ModelFiles, kind: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with files.own_code_refused():
            config = AutoConfig.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
            files.check_size(lambda: getattr(kind, "from_config", kind)(config))
            module, report = kind.from_pretrained(
                files.folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except ModelFilesError:
        raise
    except (OSError, RuntimeError, UnpicklingError, SafetensorError, json.JSONDecodeError) as error:
        raise files.damaged(files.weights[0], error) from error
    finally:
        logging.set_verbosity(verbosity)
    files.check_loaded(list(report["missing_keys"]))
    return module
