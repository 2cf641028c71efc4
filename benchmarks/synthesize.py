"""Pictures of the source `synthesize`, beside the bare loop over the same pipeline, in turns.

    python -m benchmarks.synthesize [--kind sd] [--real] [--pixels 64] [--steps 8] [--batch 8] [--prompts 32]
                                    [--rounds 5] [--json]

stage      ingest of a unit: drawn, checked, encoded, checked again as any input, written and committed
bare       the pipeline's own call in a loop, with the same prompts, seeds and batches, to PIL pictures

Models are loaded before, and their weights are random: tiny ones, or with `--real` a Stable Diffusion 1.5 of the real
size, for a GPU. The pictures of both are first checked equal. `ratio_bare` = bare / stage, in seconds; medians. Beside
them `cpu_seconds`, the process's own work, which other processes of the machine change less.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import argument_parser, print_figures
from microdit.model.device import best_device
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.sources.adapters.synthesize import Synthesize
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.sources.synthesis.drawing import to_pixels
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare
from microdit.pipeline.stages.stage import UnitTask
from tests.pipeline.helpers.tiny_pipelines import PIPELINES, clip_text, save_pipeline, spread, tokenizer


def save_real(folder: Path) -> Path:
    """Save a Stable Diffusion 1.5 of the real size, with random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = clip_text().config.to_dict() | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    config |= {"num_attention_heads": 12, "max_position_embeddings": 77}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**config)),
        tokenizer=tokenizer(77),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    spread(pipeline, 0)
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_config(folder: Path, model: Path, args: Any) -> BuildConfig:
    """Make the config of one unit."""
    maker = {
        "model": str(model),
        "steps": args.steps,
        "size": args.pixels,
        "batch": args.batch,
        "dtype": "bfloat16" if args.real else "float32",
    }
    numbers = [str(number) for number in range(args.prompts)]
    prompts = {"templates": ["a red apple {number}"], "lists": {"number": numbers}}
    source = {"adapter": "synthesize", "prompts": prompts, "makers": [maker], "prompts_per_unit": args.prompts}
    return BuildConfig.model_validate(
        {
            "name": "drawn",
            "corpus": str(folder),
            "sources": {"drawn": source},
            "images": {"min_side": 16, "format": args.format},
            "resources": {"scratch": str(folder.parent / "scratch")},
        }
    )


def bare_loop(pipeline: Any, source: Synthesize, args: Any) -> list[Any]:
    """Draw the unit's pictures by the pipeline alone."""
    import torch

    drawn: list[Any] = []
    pictures = source._pictures(0, 0, args.prompts)
    for start in range(0, len(pictures), args.batch):
        batch = pictures[start : start + args.batch]
        generators = [torch.Generator("cpu").manual_seed(picture.seed) for picture in batch]
        prompts = [picture.prompt.text for picture in batch]
        size = {"num_inference_steps": args.steps, "width": args.pixels, "height": args.pixels}
        drawn += pipeline(prompt=prompts, generator=generators, **size).images
    return drawn


def load_bare(model: Path, real: bool) -> Any:
    """Load the pipeline as a script would."""
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if real else torch.float32
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(best_device())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of some work, and those of this process's CPUs."""
    began, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - worked


def stage_round(folder: Path, source: Synthesize, model: Path, args: Any) -> tuple[float, float]:
    """Ingest the unit into a new corpus; return the seconds."""
    config = make_config(folder, model, args)
    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    declare(corpus, config, [source], [])
    unit = source.units()[0]
    seconds = timed(lambda: ingest_unit(corpus, source, UnitTask(unit), config))
    [shard] = corpus.unit("drawn", unit, 0).shards
    counts = corpus.commit("images", "drawn", shard, 0).counts
    if counts["out"] != args.prompts:
        raise SystemExit(f"{counts['failed']} of {args.prompts} pictures failed")
    return seconds


def measure(args: Any, folder: Path) -> dict[str, Any]:
    """Measure both in turns."""
    model = save_real(folder / "model") if args.real else save_pipeline(args.kind, folder / "model")
    [source] = sources_of(make_config(folder / "corpus", model, args))
    assert isinstance(source, Synthesize)
    source.load(0)
    pipeline = load_bare(model, args.real)
    ours = [one for batch in source._batches(0, 0, args.prompts, lambda _: True) for _, one in batch]
    plain = to_pixels(bare_loop(pipeline, source, args))
    difference = max(
        float(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).mean())
        for one, other in zip(ours, plain, strict=True)
    )
    if difference > 1:
        raise SystemExit(f"the pictures differ by {difference:.2f} of 255")
    seconds: dict[str, list[tuple[float, float]]] = {"stage": [], "bare": []}
    for number in range(args.rounds):
        seconds["stage"].append(stage_round(folder / f"corpus-{number}", source, model, args))
        seconds["bare"].append(timed(lambda: bare_loop(pipeline, source, args)))
    stage, bare = (statistics.median(wall for wall, _ in seconds[way]) for way in ("stage", "bare"))
    stage_cpu, bare_cpu = (statistics.median(cpu for _, cpu in seconds[way]) for way in ("stage", "bare"))
    return {
        "device": best_device(),
        "kind": "sd-1.5" if args.real else args.kind,
        "pixels": args.pixels,
        "steps": args.steps,
        "batch": args.batch,
        "pictures": args.prompts,
        "format": args.format,
        "difference": round(difference, 4),
        "stage_seconds": round(stage, 3),
        "bare_seconds": round(bare, 3),
        "stage_cpu_seconds": round(stage_cpu, 3),
        "bare_cpu_seconds": round(bare_cpu, 3),
        "stage_rate": round(args.prompts / stage, 2),
        "bare_rate": round(args.prompts / bare, 2),
        "ratio_bare": round(bare / stage, 3),
    }


def main() -> None:
    """Measure what the command line asks for."""
    parser = argument_parser(__doc__)
    parser.add_argument("--kind", choices=[*PIPELINES], default="sd")
    parser.add_argument("--real", action="store_true", help="a Stable Diffusion 1.5 of the real size")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--format", choices=["jpg", "png", "webp"], default="webp")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        print_figures(measure(args, Path(folder)), args.json)


if __name__ == "__main__":
    main()
