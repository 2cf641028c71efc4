"""Make the inputs of `benchmarks/encode.py`: a corpus, and models of the real sizes with random weights."""

import itertools
import json
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.photographs import photograph
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.images import prepare
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES, shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.stages.ingest import SCALARS

SIZES = {"demo": (64, 128), "sdxl": (256, 512)}  # of the autoencoders: the columns that are made together
CAPTIONS = "captions/source"
WORDS = [a + b + c for a, b, c in itertools.product("bcdfglmnprst", ("a", "ee", "o", "u", "ai"), ("", "n", "rt", "st"))]


def stored_image(seed: int) -> tuple[bytes, int, int]:
    """Make a JPEG as ingest stores it, its width and height."""
    rng = random.Random(seed)
    while True:
        try:
            made = prepare(photograph(rng), ImageOptions())
            return made.data, made.width, made.height
        except ValueError:  # too small
            continue


def captions(count: int) -> list[str]:
    """Make captions: half as short as alt-texts, half as long as a model's descriptions."""
    rng = random.Random(0)
    return [
        " ".join(rng.choices(WORDS, k=rng.choice([rng.randint(4, 20), rng.randint(50, 110)]))) for _ in range(count)
    ]


def make_corpus(root: Path, shards: int, samples: int, unique: int) -> Corpus:
    """Make images and captions; of more images than `unique` some are the same."""
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        images = list(pool.map(stored_image, range(min(unique, shards * samples)), chunksize=4))
    texts = captions(shards * samples)
    corpus = Corpus.create(root, "encode", samples)
    corpus.declare_source("made", {"adapter": "made"})
    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_column(CAPTIONS, {"stage": "captions"}, {"caption": "string", "tokens": "int32"})
    unit = unit_name("made", 0)
    for shard in range(shards):
        ref = ShardRef(source="made", unit=unit, shard=shard_name(unit, shard))
        with begin_attempt(corpus, IMAGES, ref) as attempt:
            for row in range(samples):
                data, width, height = images[(shard * samples + row) % len(images)]
                attempt.add(row, f"k{shard}-{row}", {"jpg": data, "json": b"{}"}, width=width, height=height)
            made = attempt.commit()
        with begin_attempt(corpus, CAPTIONS, ref, [made]) as attempt:
            for row in range(samples):
                attempt.add(row, f"k{shard}-{row}", caption=texts[shard * samples + row], tokens=0)
            attempt.commit()
    return corpus


# -- the models, in folders --------------------------------------------------------------------------------------------
def sdxl(folder: Path, device: str) -> str:
    from diffusers import AutoencoderKL

    with torch.device(device):
        module: Any = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=1024,
            scaling_factor=0.13025,
        )
    module.save_pretrained(folder)
    return str(folder)


def t5(folder: Path, device: str, **sizes: Any) -> str:
    """Make a T5 v1.1 of which a word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    told = {**named, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes)
    with torch.device(device):
        T5EncoderModel(config).bfloat16().save_pretrained(folder)
    return str(folder)


def clip_h(folder: Path, device: str) -> str:
    """Make the text tower of a CLIP ViT-H."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from microdit.model.pretrained.clip import _byte_letters

    letters = list(_byte_letters().values())
    merges = itertools.islice(itertools.product(letters, repeat=2), 49408 - 2 * 256 - 2)
    folder.mkdir()
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges), encoding="utf-8")
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    with torch.device(device):
        CLIPTextModel(config).bfloat16().save_pretrained(folder)
    return str(folder)


MODELS: dict[str, Callable[[Path, str], str]] = {
    "demo": lambda folder, device: "demo",
    "sdxl": sdxl,
    "minilm": lambda folder, device: "minilm",
    "t5-small": partial(t5, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6),
    "t5-xxl": partial(t5, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
    "dfn-clip-h": clip_h,
}
