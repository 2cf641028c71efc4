"""Measure the captions stage beside the model: committed tar to committed captions, against bare `generate`.

    python -m benchmarks.caption [--model qwen3-vl-4b] [--images 64] [--batch 16] [--rounds 3] [--json]

The stage reads the tar, decodes, resizes, makes the model's inputs, generates, checks, and commits. The bare loop has
the inputs of all batches ready on the device and does nothing but transformers' `generate`, greedily. Both say the same
of the same images in the same batches, which is checked. In turns; medians. `ratio_bare` is the bare loop's seconds by
the stage's; goal: at least 0.9 (`ratio_cpu`: of processor seconds, which depend less on what else the machine does).

`--shape 4b` is a random model of the size of Qwen3-VL-4B, for a GPU. Without either it is a tiny random one of the same
class: it generates as fast as none that anybody uses, so that the stage's own work weighs the most. What a random model
says is no caption; the checks are made, and not heeded, so that nothing is asked for once more.
"""

import contextlib
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import argument_parser, print_figures
from benchmarks.photographs import photograph
from microdit.pipeline.base.threads import chunks
from microdit.pipeline.config.build import Resources
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.config.images import ImageOptions
from microdit.pipeline.content.caption_answers import clean_answer
from microdit.pipeline.content.caption_faults import fault
from microdit.pipeline.content.images import decode_within, prepare
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.corpus.rows import read_rows
from microdit.pipeline.stages.captions import asking
from microdit.pipeline.stages.captions.vision_language import Vlm
from microdit.pipeline.stages.ingest import SCALARS
from microdit.pipeline.stages.rows import image_bytes
from microdit.pipeline.stages.stage import Task
from tests.model.pretrained.captioner_models import QWEN, vision_folder

GOAL = 0.9
COLUMN = "captions/long"


def write_4b(folder: Path, device: str) -> str:
    """Write a Qwen3-VL of the published 4B model's sizes, random bfloat16 weights, beside a tokenizer of few words."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision_folder(folder, "qwen3_vl")
    ids = {name.strip("<|>"): number for number, name in enumerate(QWEN)}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "bos_token_id": None,
            "eos_token_id": ids["im_end"], "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        },
        vision_config={
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304,
        },
        tie_word_embeddings=True, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )  # fmt: skip
    with torch.device(device):
        Qwen3VLForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    return str(folder)


def make_corpus(root: Path, images: int, side: int) -> tuple[Corpus, ShardRef]:
    """Make one shard of drawn JPEGs as ingest stores them: a short side of `side` pixels at most."""
    rng = random.Random(0)
    corpus = Corpus.create(root, "caption", images)
    corpus.declare_column(IMAGES, {"stage": "ingest", "version": 1}, SCALARS)
    corpus.declare_source("drawn", {"adapter": "drawn"})
    ref = ShardRef(source="drawn", unit="drawn-000000", shard="drawn-000000-00")
    with begin_attempt(corpus, IMAGES, ref) as attempt:
        for row in range(images):
            prepared = prepare(photograph(rng), ImageOptions(max_side=side, min_side=1))
            sizes = {"width": prepared.width, "height": prepared.height}
            sizes |= {"original_width": prepared.original_width, "original_height": prepared.original_height}
            members = {"jpg": prepared.data, "json": b"{}"}
            texts = {"caption": "", "origin": "", "license": "", "fields": "", "format": "jpeg", "sha256": ""}
            attempt.add(row, f"{row:06d}", members, **sizes, **texts, bytes=len(prepared.data))
        attempt.commit()
    return corpus, ref


def measure(
    model: str, device: str, images: int, batch: int, rounds: int, max_tokens: int, side: int, shape: str = ""
) -> dict[str, Any]:
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder, "model")
        where = model or (write_4b(tiny, device) if shape == "4b" else vision_folder(tiny, "qwen3_vl"))
        corpus, ref = make_corpus(Path(folder, "corpus"), images, side)
        options = CaptionsColumn(vlm=where, max_tokens=max_tokens, image_side=side)
        stage = Vlm({COLUMN: options}, 10**8, Resources(captions_batch=batch))
        spec = stage.columns[COLUMN]
        corpus.declare_column(COLUMN, spec.stage, spec.scalars)
        stage.load()
        inputs = ready(stage.model, corpus, spec.stage["prompt"], batch, side)
        times: dict[str, list[float]] = {"bare": [], "stage": []}
        worked: dict[str, list[float]] = {"bare": [], "stage": []}
        for number in range(rounds + 1):  # the first one to warm up
            for way in ("bare", "stage") if number % 2 else ("stage", "bare"):
                began, before = time.perf_counter(), time.process_time()
                if way == "bare":
                    found = bare(stage.model, inputs, max_tokens)
                else:
                    (commit,) = stage.run(corpus, Task(ref, {COLUMN: number}))
                if number:
                    times[way].append(time.perf_counter() - began)
                    worked[way].append(time.process_time() - before)
            compare(corpus, commit, stage.model, found, inputs)
    plain, ours = (statistics.median(took) for took in times.values())
    plain_cpu, our_cpu = (statistics.median(took) for took in worked.values())
    return {
        "model": model or f"{shape or 'tiny'} random Qwen3-VL",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "images": images,
        "batch": batch,
        "max_tokens": max_tokens,
        "rounds": rounds,
        "bare_images_per_second": round(images / plain, 2),
        "images_per_second": round(images / ours, 2),
        "bare_seconds": round(plain, 3),
        "stage_seconds": round(ours, 3),
        "ratio_bare": round(plain / ours, 4),
        "ratio_cpu": round(plain_cpu / our_cpu, 4),
        "goal": GOAL,
    }


def ready(model: Any, corpus: Corpus, prompt: str, batch: int, side: int) -> list[dict[str, Any]]:
    """Put the inputs of all batches on the device."""
    (images,) = corpus.commits(IMAGES)
    pictures = (
        model.prepare(decode_within(image_bytes(row.members), 10**8, side)) for row in read_rows(corpus, images)
    )
    return [model.collate(some, prompt) for some in chunks(pictures, batch)]


@torch.inference_mode()
def bare(model: Any, inputs: list[dict[str, Any]], max_tokens: int) -> list[Any]:
    """Return the tokens of all batches."""
    return [model.module.generate(**one, max_new_tokens=max_tokens, do_sample=False).cpu() for one in inputs]


def compare(corpus: Corpus, commit: Commit, model: Any, found: list[Any], inputs: list[dict[str, Any]]) -> None:
    """Raise AssertionError if the stage's captions are not what the bare loop's tokens say."""
    said = [answer.text for one, tokens in zip(inputs, found, strict=True) for answer in model.answers(tokens, one)]
    stored = corpus.sidecar(commit)["caption"].to_pylist()
    assert [" ".join(clean_answer(text).split()) for text in said] == stored


def let_through(*answer: Any) -> None:
    """Run the checks of an answer, and let every answer through."""
    fault(*answer)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model", default="", help="a name of microdit.model.pretrained.captioners, a folder or a repository"
    )
    parser.add_argument("--shape", choices=("4b",), default="", help="of a random model")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--side", type=int, default=512, help="of an image, at most")
    options = parser.parse_args()
    asking.fault = let_through  # type: ignore[assignment]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.redirect_stdout(sys.stderr):
        found = measure(
            options.model, device, options.images, options.batch, options.rounds, options.max_tokens, options.side,
            options.shape,
        )  # fmt: skip
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
