"""Captions to embeddings, token by token: transformers' encoders by name, hub repository or folder.

    captions --tokenizer--> ids (B, L) --encoder, mask--> embeddings (B, L, width), lengths (B,)

Three families, distinguished by the model's config: encoders (T5, BERT) give their last layer; CLIP text towers all
their positions, as open_clip does (`model.pretrained.clip`); decoder LLMs a chosen layer for a prompt made from the
caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import pad

from microdit.model.pretrained.clip import ClipTokenizer, load_open_clip, read_merges
from microdit.model.pretrained.hub import Fingerprint, ModelConfig, ModelFiles, fetch, new_folder, require
from microdit.model.pretrained.text_registry import (
    CAPTION,
    CLIP_MERGES,
    CONFIGS,
    T5,
    TOKENIZER,
    VOCABULARIES,
    TextEncoderEntry,
    folder_of,
    resolve_text_encoder,
)

LENGTHS = (*range(8, 65, 8), *range(96, 1025, 32))  # tokens to which a batch is filled up: few shapes for the GPU


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

    def __init__(self, module: Any, tokenizer: Any, name: str, fingerprint: Fingerprint):
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
        """The device it runs on, and of the embeddings."""
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
        """Embed captions: float32 (B, L, width), zero behind a caption's end, and the numbers of real tokens (B,).

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
        # a token in front that melts into the caption is kept, and is one more than fits
        return embeddings[:, : self.max_tokens], kept.sum(1).clamp(max=self.max_tokens)

    def count_cut(self, captions: Sequence[str]) -> int:
        """Count the captions that have more tokens than are read; `encode` leaves out what is behind."""
        if isinstance(self._tokenizer, ClipTokenizer):
            return sum(self._tokenizer.count(caption) > self._tokenizer.length for caption in captions)
        skip = len(self._tokenizer(self._prefix)["input_ids"]) if self._prefix else 0
        prompts = [self._prefix + caption + self._suffix for caption in captions]
        ids = self._tokenizer(prompts, truncation=False, verbose=False)["input_ids"] if prompts else []
        return sum(len(tokens) > skip + self.max_tokens for tokens in ids)

    def _encode_clip(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode (B, 77) token ids as `encode` does."""
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
    """Return the first of `LENGTHS` that has room for `longest` tokens, and no more than `most`."""
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
    """Load a text encoder of `TEXT_ENCODERS`, or any T5, BERT, CLIP text tower or decoder LLM by repository or folder.

    None is the entry's. hidden_layer: an index of transformers' `hidden_states`, such as -2. template: the prompt,
    which holds `{caption}` once. Both are for decoder LLMs alone. trim: as in `TextEncoderEntry`, for CLIP alone.

    Raises:
        ValueError: there is no such name, or it cannot be asked so.
        microdit.model.pretrained.hub.ModelFilesError: its files cannot be had.
    """
    name = str(name_or_path)
    resolved = resolve_text_encoder(name, revision, dtype, max_tokens, hidden_layer, template, trim)
    entry, revision = resolved.entry, resolved.files.revision
    files = fetch(folder_of(entry), [*CONFIGS, *TOKENIZER], weights=resolved.weights(), revision=revision)
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar for each loading of each worker helps nobody
    fingerprint = resolved.fingerprint()
    if resolved.family == "clip":
        module = _load_clip(files, entry, resolved.config)
        merges = read_merges(files.folder, module.config.vocab_size)
        tokenizer: Any = ClipTokenizer(merges, module.config.max_position_embeddings)
    else:
        with files.own_code_refused():
            config = AutoConfig.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
            kind: Any = AutoModelForTextEncoding if config.model_type in T5 else AutoModel
            module = _load(files, kind, config, entry.dtype)
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
) -> Fingerprint:
    """Give the fingerprint of `load_text_encoder(...)` from its files: of a repository only the config is fetched.

    Raises:
        As `load_text_encoder`, but for files that are damaged.
    """
    name = str(name_or_path)
    resolved = resolve_text_encoder(name, revision, dtype, max_tokens, hidden_layer, template, trim)
    vocabulary = CLIP_MERGES if resolved.family == "clip" else VOCABULARIES
    require(resolved.files, vocabulary, weights=resolved.weights())
    return resolved.fingerprint()


def _load_clip(files: ModelFiles, entry: TextEncoderEntry, options: ModelConfig) -> Any:
    """Load a CLIP text tower, of open_clip's weights or of transformers'."""
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
    """Load a class of transformers, and refuse files that lack weights of it."""
    from transformers.utils import logging

    files.check_size(lambda: getattr(kind, "from_config", kind)(config))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table of all that a T5's decoder or a CLIP's image tower has
    try:
        module, report = kind.from_pretrained(
            files.folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise files.damaged(files.weights[0], error) from error
    finally:
        logging.set_verbosity(verbosity)
    files.check_loaded([key for key in report["missing_keys"] if not key.startswith("pooler.")])  # not asked for
    return module
