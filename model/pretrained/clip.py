"""CLIP text towers, equal to open_clip: its text cleaning, its tokens and its weights' names.

    caption --clean--> text --words--> BPE --> ids (77), padded with 0 --> CLIPTextModel, causal, no other mask
        --> final layer norm of all 77 positions

Padding is no different from other tokens there: it is attended to, and its vectors depend on the caption. So no mask
may be made of the ids (0 is also "!"), and all positions are the embedding. Checked against arrays of open_clip 3.3
(`pytest tests -k openclip`).
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microdit.model.pretrained.hub import ModelConfig
from microdit.model.strict_json import read_json

START, END = "<start_of_text>", "<end_of_text>"


# Case is ignored although the text is lower-case: "ſ" (long s) counts as an "s" then.
WORDS = rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"


def clean(caption: str) -> str:
    """Clean a caption as open_clip does: mojibake mended, HTML unescaped twice, white space single, lower case."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(caption))).split()).lower()


class ClipTokenizer:
    """Byte-level BPE of CLIP. The ids follow from the merges: 256 bytes, 256 bytes that end a word, merges, start, end.

    merges: pairs in the order of their rank, as `read_merges` gives them. length: positions of the tower. Attributes:
    `start` and `end` are the ids that begin and end every caption, `size` is how many there are.
    """

    def __init__(self, merges: Sequence[tuple[str, str]], length: int = 77):
        import regex
        from tokenizers.models import BPE

        alphabet = _byte_letters()
        tokens = [*alphabet.values(), *(letter + "</w>" for letter in alphabet.values()), *(a + b for a, b in merges)]
        vocabulary = {token: i for i, token in enumerate([*tokens, START, END])}
        self.start, self.end, self.length = vocabulary[START], vocabulary[END], length
        self.size = len(tokens) + 2
        self._special = {START: self.start, END: self.end}
        self._letters = str.maketrans({chr(byte): letter for byte, letter in alphabet.items()})
        self._words = regex.compile(WORDS, regex.IGNORECASE)
        self._bpe = BPE(vocab=vocabulary, merges=list(merges), end_of_word_suffix="</w>")

    def __call__(self, captions: Iterable[str]) -> Tensor:
        """Tokenize captions, int64 (B, length): start, the caption's tokens, end, then 0; a longer caption is cut."""
        rows = []
        for caption in captions:
            ids = [self.start]
            for word in self._words.findall(clean(caption)):
                ids += self._ids(word)
                if len(ids) >= self.length:
                    break
            ids = [*ids[: self.length - 1], self.end]
            rows.append(ids + [0] * (self.length - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.length)

    def count(self, caption: str) -> int:
        """Count the tokens of a whole caption, start and end included, however many are read."""
        return 2 + sum(len(self._ids(word)) for word in self._words.findall(clean(caption)))

    def save(self, folder: Path) -> None:
        """Write `vocab.json` and `merges.txt`, as the tokenizers of transformers read them."""
        self._bpe.save(str(folder))

    def _ids(self, word: str) -> list[int]:
        if word in self._special:
            return [self._special[word]]
        letters = word.encode().decode("latin-1").translate(self._letters)
        return [token.id for token in self._bpe.tokenize(letters)]


def _byte_letters() -> dict[int, str]:
    """Map each byte to a visible letter, in the order of the ids: printable ones to themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def read_merges(folder: Path, vocabulary: int) -> list[tuple[str, str]]:
    """Read the merges of a tokenizer with `vocabulary` tokens, from `merges.txt` or `tokenizer.json`.

    Raises:
        ValueError: neither is there, or it holds too few.
    """
    if (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        pairs = [line.split() for line in lines["#version" in lines[0] :] if line]
    elif (folder / "tokenizer.json").is_file():
        merges = read_json(folder / "tokenizer.json")["model"]["merges"]
        pairs = [merge.split() if isinstance(merge, str) else merge for merge in merges]
    else:
        raise ValueError(f"{folder} has no merges.txt and no tokenizer.json: a CLIP text tower needs its tokenizer")
    wanted = vocabulary - 2 * 256 - 2
    if len(pairs) < wanted or any(len(pair) != 2 for pair in pairs[:wanted]):
        raise ValueError(f"the tokenizer in {folder} has {len(pairs)} merges, expected {wanted} pairs")
    return [(first, second) for first, second in pairs[:wanted]]


def open_clip_config(config: Mapping[str, Any]) -> ModelConfig:
    """Make the options of transformers' `CLIPTextConfig` for a model that `open_clip_config.json` describes.

    Raises:
        ValueError: its text tower is no plain CLIP tower.
    """
    model = config["model_cfg"]
    text = model["text_cfg"]
    behind = {"pool_type", "proj_type", "proj_bias", "output_tokens", "eos_id"}  # what comes after the final norm
    plain = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"} | behind
    odd = sorted(key for key, value in text.items() if key not in plain and value)
    if odd:
        raise ValueError(f"open_clip_config.json: a text tower with {', '.join(odd)} is no plain CLIP text tower")
    return {
        "vocab_size": text["vocab_size"],
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": text["vocab_size"] - 2,
        "eos_token_id": text["vocab_size"] - 1,
    }


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the text tower of an open_clip state dict (CLIP, CustomTextCLIP) to the names of `CLIPTextModel`.

    Raises:
        ValueError: there is no such tower in it.
    """
    prefix = "text." if "text.token_embedding.weight" in state else ""
    if f"{prefix}token_embedding.weight" not in state:
        raise ValueError("these weights hold no open_clip text tower: there is no token_embedding.weight")
    renamed = {
        "embeddings.token_embedding.weight": state[f"{prefix}token_embedding.weight"],
        "embeddings.position_embedding.weight": state[f"{prefix}positional_embedding"],
        "final_layer_norm.weight": state[f"{prefix}ln_final.weight"],
        "final_layer_norm.bias": state[f"{prefix}ln_final.bias"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names["attn.out_proj"] = "self_attn.out_proj"
    blocks = f"{prefix}transformer.resblocks."
    for key, value in state.items():
        if not key.startswith(blocks):
            continue
        number, _, rest = key.removeprefix(blocks).partition(".")
        layer = f"encoder.layers.{number}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            for name, part in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                renamed[f"{layer}self_attn.{name}.{kind}"] = part
        else:
            module, _, kind = rest.rpartition(".")
            renamed[f"{layer}{names[module]}.{kind}"] = value
    return renamed


def load_open_clip(weights: Path, options: Mapping[str, Any]) -> Any:
    """Load a `CLIPTextModel` (float32, CPU) with open_clip's text tower, from safetensors or a torch state dict."""
    from transformers import CLIPTextConfig, CLIPTextModel

    state: Any
    if weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(weights)
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    module = CLIPTextModel(CLIPTextConfig(**options))
    renamed = from_open_clip(state.get("state_dict", state))
    prefix = "text_model." if "text_model.final_layer_norm.weight" in module.state_dict() else ""
    module.load_state_dict({prefix + key: value.float() for key, value in renamed.items()}, strict=True)
    return module
