"""Vision models that score pictures: transformers' models by hub repository or folder, and one that is a package.

    uint8 (H, W, 3) --image processor, on Pillow--> float32 (3, h, w) --network--> by the task

    classify   the probability of a label
    aesthetic  a number: a CLIP image tower with the head of LAION's predictor V2; or as classify
    embed      pooled features of unit length
    compare    cosines with captions, of a model with an image and a text tower (CLIP, SigLIP)

Weights are taken from safetensors alone: nothing that comes from the hub is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from microdit.model.pretrained.hub import Fingerprint, ModelConfig, ModelFiles, ModelFilesError, fetch, require
from microdit.model.pretrained.packaged import EFFICIENTNET, load_efficientnet, package_fingerprint
from microdit.model.pretrained.text_registry import TOKENIZER, VOCABULARIES

Task = Literal["classify", "aesthetic", "embed", "compare"]
CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")

WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-?????-of-?????.safetensors"),
)

HEAD = "AestheticsPredictorV2"  # how the classes of CLIP towers with LAION's head are called
HALF = ("clip", "siglip")  # model types that float16 holds, which rounds an eighth as much as bfloat16


@dataclass(frozen=True)
class ResolvedVisionModel:
    """A resolved name: config files, what they say, and the dtype. `label`: index of the label asked for."""

    files: ModelFiles
    config: ModelConfig
    dtype: torch.dtype
    label: int | None = None

    @property
    def has_head(self) -> bool:
        """True of a CLIP image tower with the head of LAION's predictor."""
        return any(name.startswith(HEAD) for name in self.config.get("architectures") or ())


class VisionModel:
    """A loaded model. Made by `load_vision_model`.

    Attributes:
        fingerprint: identifies its numbers: files, dtype, label, as `vision_fingerprint` gives them.
        device: what it runs on.
    """

    def __init__(self, network: Any, processor: Any, fingerprint: Fingerprint, tokenizer: Any = None):
        self.fingerprint = fingerprint
        self._network, self._processor, self._tokenizer = network, processor, tokenizer
        self._dtype: torch.dtype = getattr(torch, fingerprint["dtype"])

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self._network.parameters()).device
        return device

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Prepare uint8 (H, W, 3) for the network: float32 (3, h, w). May be called by several threads."""
        batch = self._processor(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"]
        return np.asarray(batch[0], np.float32)

    @torch.inference_mode()
    def see(self, images: Sequence[np.ndarray], size: int | None = None) -> np.ndarray:
        """Compute float32 (B,) scores, or (B, width) features of unit length, of prepared images.

        size: the images are filled up to so many with black ones, as rounding depends on the shape of a batch.

        Raises:
            ValueError: the images are not of one shape.
        """
        batch = torch.zeros(max(size or 0, len(images)), *images[0].shape)
        for i, image in enumerate(images):
            if image.shape != batch.shape[1:]:
                raise ValueError(f"an image of shape {image.shape} beside one of {tuple(batch.shape[1:])}")
            batch[i] = torch.from_numpy(image)
        scores: Tensor = self._network(batch.to(self.device, self._dtype))
        return scores[: len(images)].float().cpu().numpy()

    @torch.inference_mode()
    def read(self, captions: Sequence[str], size: int | None = None) -> np.ndarray:
        """Compute float32 (B, width), features of unit length of captions, by the text tower; `size` as in `see`."""
        padded = [*captions, *[""] * ((size or 0) - len(captions))]
        tokens = self._tokenizer(
            padded, padding="max_length", truncation=True, max_length=self._network.length, return_tensors="pt"
        )
        return self._network.read(dict(tokens.to(self.device)))[: len(captions)].float().cpu().numpy()

    def count_cut(self, captions: Sequence[str]) -> int:
        """Count the captions that have more tokens than the text tower reads; `read` leaves out what is behind."""
        ids = self._tokenizer(list(captions), truncation=False, verbose=False)["input_ids"] if captions else []
        return sum(len(tokens) > self._network.length for tokens in ids)


def vision_fingerprint(
    name_or_path: str | Path, task: Task, *, label: str | None = None, revision: str | None = None
) -> Fingerprint:
    """Give the fingerprint of `load_vision_model(...)` from its files: of a repository only the configs are fetched.

    Raises:
        As `load_vision_model`, but for files that are damaged.
    """
    if str(name_or_path) == EFFICIENTNET and task == "embed":
        return {**package_fingerprint(EFFICIENTNET), "dtype": "float32"}
    resolved = _resolve(str(name_or_path), task, label, revision)
    require(resolved.files, *([VOCABULARIES] if task == "compare" else []), weights=WEIGHTS)
    return _fingerprint(resolved, task, label)


def load_vision_model(
    name_or_path: str | Path,
    task: Task,
    *,
    label: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> VisionModel:
    """Load a model of a hub repository (`owner/name`) or a folder; to embed, `efficientnet` too.

    label: of a classifier, whose probability is the score; not needed if it has but one, or a head as `aesthetic` says.

    Raises:
        ValueError: there is no such name, or the model is none for the task.
        microdit.model.pretrained.hub.ModelFilesError: its files cannot be had.
    """
    name = str(name_or_path)
    if name == EFFICIENTNET and task == "embed":
        network, processor = load_efficientnet()
        return VisionModel(network.to(device), processor, vision_fingerprint(name, task))
    resolved = _resolve(name, task, label, revision)
    patterns = [*CONFIGS, *(TOKENIZER if task == "compare" else ())]
    files = fetch(name, patterns, weights=WEIGHTS, revision=resolved.files.revision)
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    asked: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with files.own_code_refused():
        processor = AutoImageProcessor.from_pretrained(files.folder, backend="pil", **asked)
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **asked) if task == "compare" else None
    network = _network(files, resolved, task).to(device).eval().requires_grad_(False)
    return VisionModel(network, processor, _fingerprint(resolved, task, label), tokenizer)


def _resolve(name: str, task: Task, label: str | None, revision: str | None) -> ResolvedVisionModel:
    try:
        files = fetch(name, CONFIGS, revision=revision)
    except ValueError as error:
        also = f", nor {EFFICIENTNET}" if task == "embed" else ""
        raise ValueError(f"vision model {error}{also}") from error
    there = files.matching(*CONFIGS)
    config = files.read_json("config.json") if "config.json" in there else {}
    kind = config.get("model_type")
    if kind is None or there == ["config.json"]:
        lacks = "config.json with a model_type" if kind is None else "preprocessor_config.json"
        raise ValueError(f"vision model {name!r}: there is no {lacks}: it is no vision model of transformers")
    resolved = ResolvedVisionModel(files, config, torch.float16 if str(kind).startswith(HALF) else torch.bfloat16)
    if task == "compare" and not {"text_config", "vision_config"} <= config.keys():
        raise ValueError(f"vision model {name!r}: {kind!r} has no text tower beside that for images, as a CLIP has")
    if task in ("embed", "compare"):
        return resolved
    if resolved.has_head and task == "aesthetic":
        if label is not None:
            raise ValueError(f"vision model {name!r}: it gives a number and has no labels; leave out label = {label!r}")
        return ResolvedVisionModel(files, config, torch.float16)
    labels = {str(text): int(i) for i, text in (config.get("id2label") or {}).items()}
    if label is None and len(labels) == 1:
        return ResolvedVisionModel(files, config, resolved.dtype, 0)
    if label not in labels:
        known = ", ".join(labels) or "none: it is no classifier"
        raise ValueError(f"vision model {name!r}: it has no label {label!r}; its labels are {known}")
    return ResolvedVisionModel(files, config, resolved.dtype, labels[label])


def _fingerprint(resolved: ResolvedVisionModel, task: Task, label: str | None) -> Fingerprint:
    tokenizer = TOKENIZER if task == "compare" else ()
    origin = resolved.files.origin(*CONFIGS, *tokenizer, *(file for group in WEIGHTS for file in group))
    return {**origin, "dtype": str(resolved.dtype).removeprefix("torch."), **({"label": label} if label else {})}


# -- networks: float (B, 3, h, w) to scores or features ----------------------------------------------------------------
def _network(files: ModelFiles, resolved: ResolvedVisionModel, task: Task) -> torch.nn.Module:
    from transformers import AutoModel, AutoModelForImageClassification, CLIPVisionConfig, CLIPVisionModelWithProjection

    if task in ("embed", "compare"):
        module, random = load_module(files, AutoModel, resolved.dtype, may_lack="pooler.")
        return _Features(module, pooled=not random)
    if resolved.has_head and task == "aesthetic":
        config = CLIPVisionConfig(**{key: value for key, value in resolved.config.items() if key != "model_type"})
        module, _ = load_module(files, CLIPVisionModelWithProjection, resolved.dtype, config=config)
        return _WithHead(module, _head(files, resolved.config))
    module, _ = load_module(files, AutoModelForImageClassification, resolved.dtype)
    return _Probability(module, int(resolved.label or 0))


def load_module(
    files: ModelFiles, kind: Any, dtype: torch.dtype, may_lack: str | None = None, **more: Any
) -> tuple[torch.nn.Module, list[str]]:
    """Load a module, and list the weights that the files lack: none but those with `may_lack` in their names."""
    from transformers import AutoConfig
    from transformers.utils import logging

    config = more.get("config") or AutoConfig.from_pretrained(
        files.folder, local_files_only=True, trust_remote_code=False
    )
    files.check_size(lambda: getattr(kind, "from_config", kind)(config))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table of all that is in the files and not asked for
    try:
        module, report = kind.from_pretrained(
            files.folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **more,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise files.damaged(files.weights[0], error) from error
    finally:
        logging.set_verbosity(verbosity)
    random = [key for key in report["missing_keys"] if may_lack is not None and may_lack in key]
    files.check_loaded([key for key in report["missing_keys"] if key not in random])
    return module, random


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


class _Features(torch.nn.Module):
    """Features of unit length: those in which a CLIP compares, else the pooler's, else the class token's."""

    def __init__(self, module: Any, pooled: bool):
        super().__init__()
        self.module, self._pooled = module, pooled
        self._compares = hasattr(module, "get_image_features")
        text = getattr(module.config, "text_config", None)
        self.length: int | None = getattr(text, "max_position_embeddings", None)

    def forward(self, pixels: Tensor) -> Tensor:
        if self._compares:
            return _unit(pooled_features(self.module.get_image_features(pixel_values=pixels)))
        output = self.module(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None) if self._pooled else None
        return _unit(output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1))

    def read(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return _unit(pooled_features(self.module.get_text_features(**tokens)))


def pooled_features(output: Any) -> Tensor:
    """Take the tensor of `get_image_features` or `get_text_features`, which may come in an output object."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


class _Probability(torch.nn.Module):
    """The probability of one label; of a model with a single label, its output as it is."""

    def __init__(self, module: Any, label: int):
        super().__init__()
        self.module, self._label = module, label

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.module(pixel_values=pixels).logits.float()
        if self.module.config.problem_type == "multi_label_classification":
            logits = logits.sigmoid()
        elif logits.shape[1] > 1:
            logits = logits.softmax(-1)
        return logits[:, self._label]


class _WithHead(torch.nn.Module):
    """A number from the unit features of a CLIP image tower."""

    def __init__(self, module: Any, head: torch.nn.Module):
        super().__init__()
        self.module, self.head = module, head

    def forward(self, pixels: Tensor) -> Tensor:
        score: Tensor = self.head(_unit(self.module(pixel_values=pixels).image_embeds)).squeeze(-1)
        return score


def _head(files: ModelFiles, config: Mapping[str, Any]) -> torch.nn.Sequential:
    """Load the layers of LAION's head (`layers.<n>.weight` and `.bias`), float32; with ReLUs if its class has them.

    Raises:
        ModelFilesError: there are no such weights, or they do not fit together.
    """
    relu = any(name.endswith("ReLU") for name in config["architectures"])
    layers: list[torch.nn.Linear] = []
    try:
        with safe_open(files.folder / files.weights[0], "pt") as weights:
            names = (re.fullmatch(r"layers\.(\d+)\.weight", key) for key in weights.keys())  # noqa: SIM118
            for number in sorted(int(name[1]) for name in names if name):
                weight, bias = (weights.get_tensor(f"layers.{number}.{part}").float() for part in ("weight", "bias"))
                layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
                layer.load_state_dict({"weight": weight, "bias": bias})
                layers.append(layer)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise files.damaged(files.weights[0], error) from error
    if not layers:
        raise ModelFilesError(f"{files.name}: {files.weights[0]} has no layers.<n>.weight: the head is missing")
    ends = [layer.out_features for layer in layers]
    if [config["projection_dim"], *ends] != [*(layer.in_features for layer in layers), 1]:
        raise files.damaged(files.weights[0], ValueError("its head does not fit together"))
    if not relu:
        return torch.nn.Sequential(*layers)
    return torch.nn.Sequential(*[part for layer in layers for part in (torch.nn.ReLU(), layer)][1:])
