"""Tiny text encoders with random weights, in the layout of the repositories that the registry names.

Each `..._files` gives the files of a repository; other files of the real one, that must not be fetched, are with them.
"""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.model.pretrained.openclip_format import write_merges

WORDS = (
    "a", "an", "the", "red", "green", "blue", "apple", "snail", "dog", "cat", "lighthouse", "fog", "boat", "runs",
    "on", "in", "of", "with", "under",
)  # fmt: skip

SENTENCES = [" ".join(pair) for pair in itertools.product(WORDS, repeat=2)]
CAPTIONS = ["red apple", "a dog under the boat in the fog with a café ☕", "", "cat"]

DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def files_of(folder: Path, module: PreTrainedModel | None = None, **saving: Any) -> dict[str, bytes]:
    """The files in a folder, after `module` was saved there too."""
    if module is not None:
        module.save_pretrained(folder, **saving)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_norms(module: PreTrainedModel) -> PreTrainedModel:
    """Norm weights that are not all alike: a norm that is left out, or comes twice, is then seen."""
    for name, parameter in module.named_parameters():
        if "norm" in name.lower() and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1, std=0.3)
    return module


def t5_files(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """google/t5-v1_1-xxl: a sentencepiece model, one torch file with encoder and decoder."""
    folder.mkdir(exist_ok=True)
    spiece = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=spiece, vocab_size=80, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name="nmt_nfkc",
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(spiece.getvalue())
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = [f"<extra_id_{i}>" for i in range(100)]
    tokenizer = {**special, "extra_ids": 100, "additional_special_tokens": extra, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "additional_special_tokens": extra}))
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        n_positions=512, tie_word_embeddings=False, architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    torch.save(with_norms(T5ForConditionalGeneration(config)).state_dict(), folder / "pytorch_model.bin")
    config.save_pretrained(folder)
    return files_of(folder) | {"tf_model.h5": b"other framework", "generation_config.json": b"{}"}


def gemma_files(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """google/gemma-2-2b-it: BPE with bytes as a fallback, <bos> before every text, weights in parts."""
    folder.mkdir(exist_ok=True)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    known = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=known, initial_alphabet=["\n"], show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES, "user model"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    options = {**named, "add_bos_token": True, "add_eos_token": False, "tokenizer_class": "GemmaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    torch.manual_seed(seed)
    config = Gemma2Config(vocab_size=400, sliding_window=16, query_pre_attn_scalar=8, **DECODER)
    return files_of(folder, with_norms(Gemma2ForCausalLM(config)), max_shard_size="40KB") | {"README.md": b"#"}


def qwen3_files(folder: Path, seed: int = 0) -> dict[str, bytes]:
    """Qwen/Qwen3-0.6B: byte-level BPE that adds no token, tied embeddings, one file of weights."""
    folder.mkdir(exist_ok=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, "user assistant"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"eos_token": special[2], "pad_token": special[0], "add_bos_token": False, "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps({**options, "tokenizer_class": "Qwen2Tokenizer"}))
    torch.manual_seed(seed)
    module = with_norms(Qwen3ForCausalLM(Qwen3Config(vocab_size=360, tie_word_embeddings=True, **DECODER)))
    return files_of(folder, module) | {"LICENSE": b"-"}


def bert_files(folder: Path, kind: str = "bert") -> dict[str, bytes]:
    """A BERT with a pooler, or the masked language model without one, or a RoBERTa; WordPiece."""
    folder.mkdir(exist_ok=True)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    order = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]  # pad is 1, as in RoBERTa
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=order, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {**special, "mask_token": "[MASK]", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 200, "pad_token_id": 1}
    if kind == "roberta":
        return files_of(folder, RobertaModel(RobertaConfig(max_position_embeddings=34, **sizes)))
    config = BertConfig(max_position_embeddings=64, **sizes)
    return files_of(folder, (BertForMaskedLM if kind == "masked" else BertModel)(config))


def clip_files(folder: Path, *, whole: bool = True) -> dict[str, bytes]:
    """A CLIP as transformers saves it, with or without the image tower, and the tokenizer's files."""
    folder.mkdir(exist_ok=True)
    write_merges(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextConfig(vocab_size=49408, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407, **sizes)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    module = with_norms(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())))
    if not whole:
        from transformers import CLIPTextModel

        tower = CLIPTextModel(text)
        tower.load_state_dict({k: v for k, v in module.state_dict().items() if k in tower.state_dict()}, strict=False)
        return files_of(folder, tower)
    return files_of(folder, module)
