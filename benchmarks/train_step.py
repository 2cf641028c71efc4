"""A training step of ours beside the reference's way, on equal samples, in turns, in one run.

    python -m benchmarks.train_step [--device cpu] [--preset tiny_2] [--json]

ours        trainer.learner.Learner: experts gather, text padded to the first length that holds it, with a mask; fused
            AdamW
reference   the same weights as the official code would use them: experts by products with one-hot matrices, all text
            padded to 77, scaled_dot_product_attention everywhere, autocast, AdamW as torch makes it; eager, and with
            --compile (default on a GPU) also compiled as a whole, whichever is faster

Both are measured with each of --micro-batches, and their best counts. First their losses are checked equal for equal
text, in fp32. On a CPU time is the process' CPU time, so that other programs disturb it little; memory is the peak of a
step above what was held before it.

ratio_reference   reference / ours, in seconds for an image
ratio_equal_text  the same where ours is given the 77 too
mfu               model FLOPs of ours (microdit.model.flops) of the GPU's peak in bf16, or of a matrix product on a CPU
"""

import argparse
import contextlib
import copy
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microdit.model.layers
from benchmarks.experts import one_hot_experts, peak_bytes
from benchmarks.harness import argument_parser
from microdit.model.device import has_fast_bf16
from microdit.model.edm import EDM
from microdit.model.flops import gpu_peak, training_flops
from microdit.model.layers import Experts
from microdit.model.network import PRESETS, MicroDiT
from microdit.trainer.data.batch import Batch, MicroBatch, pad_text
from microdit.trainer.learner import Learner, compile_blocks
from microdit.trainer.processes import Team
from microdit.trainer.recipe import LegRecipe, Recipe

GOALS = {"cuda": 1.9, "cpu": 1.2}
# `mini` is for rehearsals: its figures say nothing
SIZES = PRESETS | {"mini": {"dim": 64, "depth": 2, "head_dim": 32, "patch_mixer_dim": 64, "patch_mixer_depth": 1}}
TEXT = 77  # what the reference pads to
LENGTHS = [16, 24, 32, 48, 64, TEXT]


class Reference:
    """The reference's way, on a copy of the weights of `net`."""

    def __init__(self, net: MicroDiT, stage: LegRecipe, bf16: bool, compiled: bool = False):
        self.net, self.stage, self.bf16 = copy.deepcopy(net), stage, bf16
        for module in self.net.modules():
            if isinstance(module, Experts):
                module.forward = partial(one_hot_experts, module)  # type: ignore[method-assign]
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-5, weight_decay=0.1)
        self.run: Callable[..., Any] = torch.compile(self.net) if compiled else self.net
        self.device = next(self.net.parameters()).device

    def loss(self, part: MicroBatch) -> Tensor:
        sigma = EDM.sigma_from_normal(part.sigma_normal, self.stage.p_mean, self.stage.p_std)
        run = _Through(self.run, self.net.patch_size)
        before, microdit.model.layers.attention = microdit.model.layers.attention, plain_attention
        try:
            return EDM().loss(
                run, part.latents, part.text, sigma=sigma, noise=part.noise,  # type: ignore[arg-type]
                mask_ratio=self.stage.mask_ratio, permutation=part.permutation,
            )  # fmt: skip
        finally:
            microdit.model.layers.attention = before

    def step(self, batch: Batch) -> None:
        for part in batch.micro_batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.loss(part.to(self.device)) * (len(part.latents) / len(batch.positions))
            loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 0.25)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Through:
    """The part of a network that `EDM.loss` needs: to be called, and its patch size."""

    def __init__(self, run: Callable[..., Any], patch_size: int):
        self.run, self.patch_size = run, patch_size

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float, key_mask: Tensor | None = None) -> Tensor:
    """Compute attention by scaled_dot_product_attention whatever the length; it has no text mask."""
    batch, queries, hidden = q.shape
    q, k = (F.layer_norm(z, (hidden,), eps=eps).to(v.dtype) for z in (q, k))
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, queries, hidden)


# -- what both are given ---------------------------------------------------------------------------------------------
def make_batch(config: dict[str, Any], images: int, micro_batch: int, ragged: bool, text: int | None = None) -> Batch:
    """Made-up samples, the same ones for any micro-batch.

    ragged: texts of 8 to 48 tokens, as T5 gives for captions, padded as the trainer does; else all padded to `text`,
    zeros behind them, without telling what is padding.
    """
    rng = np.random.default_rng(0)
    size, channels = config["input_size"], config["in_channels"]
    tokens = (size // config["patch_size"]) ** 2
    lengths = np.clip(rng.lognormal(3.0, 0.5, images).astype(int), 8, 48)
    texts = [rng.normal(size=(n, config["caption_channels"])).astype(np.float16) for n in lengths]
    latents, noise = (torch.from_numpy(rng.normal(size=(images, channels, size, size)).astype("f")) for _ in range(2))
    sigma = torch.from_numpy(rng.normal(size=images).astype("f"))
    permutation = torch.from_numpy(rng.random((images, tokens)).argsort(axis=1))
    order = np.argsort(lengths, kind="stable")
    parts = []
    for start in range(0, images, micro_batch):
        rows = order[start : start + micro_batch]
        padded, mask = pad_text([texts[i] for i in rows], LENGTHS if ragged else [text or TEXT])
        parts.append(
            MicroBatch(
                torch.from_numpy(rows),
                latents[rows],
                padded,
                mask if ragged else torch.ones(mask.shape, dtype=torch.bool),
                sigma[rows],
                noise[rows],
                permutation[rows],
            )
        )
    return Batch(order, parts)


def make_learner(preset: str, input_size: int, mask_ratio: float, device: str) -> Learner:
    stage = {"latents": "none", "steps": 1, "batch": 128, "mask_ratio": mask_ratio, "learning_rate": 1e-5}
    named = {"name": "step", "corpus": "none", "out": "none", "text": {"none": 1.0}}
    recipe = Recipe.model_validate(named | {"stages": [stage]})
    config = SIZES[preset] | {"input_size": input_size, "caption_channels": 1024}
    learner = Learner(recipe, config, Team(0, 1, torch.device(device)))
    # a fresh network's output is zero, and with it most of its gradients
    nn.init.normal_(learner.net.final_layer.linear.weight, std=0.02)
    return learner


# -- measuring -------------------------------------------------------------------------------------------------------
def loss_difference(learner: Learner, reference: Reference, batch: Batch) -> float:
    """Largest relative difference of the losses for equal inputs, in fp32."""
    differences = []
    with torch.no_grad():
        for part in batch.micro_batches:
            part = part.to(learner.device)
            (ours, _), theirs = learner.objective(part, reference.stage), reference.loss(part)
            differences.append(abs(ours.item() / theirs.item() - 1))
    return max(differences)


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product here."""
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = clock(device)
        a @ a
        seconds.append(clock(device) - start)
    return 2 * 1024**3 / min(seconds)


def time_in_turns(
    runs: dict[tuple[str, int], Callable[[], Any]], images: int, repeat: int, device: str
) -> dict[str, dict[str, Any]]:
    """Time each (form, micro-batch) in turns; return the fastest micro-batch of each form that fits into memory."""
    peaks = {}
    for key, run in runs.items():
        with contextlib.suppress(torch.OutOfMemoryError):
            peaks[key] = peak_bytes(run, device)  # and warm
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in peaks}
    for _ in range(repeat):
        for key, measured in seconds.items():
            start = clock(device)
            runs[key]()
            measured.append(clock(device) - start)
    best: dict[str, dict[str, Any]] = {}
    for (name, micro_batch), measured in seconds.items():
        row = {
            "seconds": min(measured), "images_per_second": images / min(measured), "micro_batch": micro_batch,
            "peak_mib": peaks[name, micro_batch] / 2**20,
        }  # fmt: skip
        if name not in best or row["seconds"] < best[name]["seconds"]:
            best[name] = row
    return best


def measure(options: argparse.Namespace, pixels: int, mask_ratio: float) -> dict[str, Any]:
    device, size = options.device, pixels // 8
    learner = make_learner(options.preset, size, mask_ratio, device)
    stage, config = learner.recipe.stages[0], learner.net.config
    images = max(options.micro_batches)

    same = make_batch(config, min(images, 4), min(images, 4), ragged=False)
    difference = loss_difference(learner, Reference(learner.net, stage, bf16=False), same)
    if difference > 1e-4:
        raise SystemExit(f"{pixels} px: for equal inputs the losses differ by {difference:.2g}")
    if options.compile:  # not before: what is asked for no gradients is compiled anew
        compile_blocks(learner.net)

    reference = Reference(learner.net, stage, learner.bf16)
    forms: dict[str, Callable[[Batch], Any]] = {
        "ours": lambda batch: learner.step(batch, stage, 1e-5),
        "ours_equal_text": lambda batch: learner.step(batch, stage, 1e-5),
        "reference_eager": reference.step,
    }
    if options.compile:
        forms["reference_compiled"] = Reference(learner.net, stage, learner.bf16, compiled=True).step
    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    for micro_batch in options.micro_batches:
        for name, form in forms.items():
            batch = make_batch(config, images, micro_batch, ragged=name == "ours")
            runs[name, micro_batch] = partial(form, batch)
    best = time_in_turns(runs, images, options.repeat, device)
    theirs = min((row for name, row in best.items() if name.startswith("reference")), key=lambda row: row["seconds"])
    parts = make_batch(config, images, best["ours"]["micro_batch"], ragged=True).micro_batches
    shape = (config["in_channels"], size, size)
    flops = sum(len(p.latents) * training_flops(learner.net, shape, p.text.shape[1], mask_ratio) for p in parts)
    peak = gpu_peak(torch.cuda.get_device_name()) if device == "cuda" else None
    peak = peak or product_rate(device, torch.bfloat16 if learner.bf16 else torch.float32)
    ratio = theirs["seconds"] / best["ours"]["seconds"]
    kernels = {}
    if options.profile:
        batch = make_batch(config, images, best["ours"]["micro_batch"], ragged=True)
        kernels = {"slowest": slowest_kernels(partial(learner.step, batch, stage, 1e-5), options.profile, device)}
    return {
        "pixels": pixels,
        "mask_ratio": mask_ratio,
        "images": images,
        "loss_difference": difference,
        **best,
        "ratio_reference": ratio,
        "ratio_equal_text": theirs["seconds"] / best["ours_equal_text"]["seconds"],
        "memory_ratio": theirs["peak_mib"] / best["ours"]["peak_mib"],
        "gflop_per_image": flops / images / 1e9,
        "mfu": flops / best["ours"]["seconds"] / peak,
        "goal": GOALS[device],
        "met": ratio >= GOALS[device],
        **kernels,
    }


def slowest_kernels(work: Callable[[], object], count: int, device: str) -> list[dict[str, Any]]:
    """Profile `work` once: the kernels (on a CPU: operators) of the most time, each with its share and calls."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU]) as profiled:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    took = {
        e.key: e.self_device_time_total if device == "cuda" else e.self_cpu_time_total for e in profiled.key_averages()
    }
    calls = {event.key: event.count for event in profiled.key_averages()}
    total = sum(took.values()) or 1.0
    names = sorted(took, key=lambda name: -took[name])[:count]
    return [{"name": name[:120], "share": round(took[name] / total, 4), "calls": calls[name]} for name in names]


def main(arguments: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", choices=tuple(SIZES), help="default: xl_2 on a GPU, tiny_2 on a CPU")
    parser.add_argument("--pixels", nargs="+", type=int, help="default: 256 and 512 on a GPU, 256 on a CPU")
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--micro-batches", nargs="+", type=int, help="default: 32 64 128 on a GPU, 8 on a CPU")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="name the slowest kernels of our step")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.preset = options.preset or ("xl_2" if gpu else "tiny_2")
    options.pixels = options.pixels or ([256, 512] if gpu else [256])
    options.micro_batches = options.micro_batches or ([32, 64, 128] if gpu else [8])
    options.compile = gpu if options.compile is None else options.compile
    if gpu and not torch.cuda.is_available():
        print(json.dumps({"device": "cuda", "rows": "not measured"}) if options.json else "not measured: no GPU here")
        return 0
    rows = []
    for pixels in options.pixels:
        rows.append(measure(options, pixels, options.mask_ratio))
        if not options.json:
            row = rows[-1]
            print(
                f"{options.preset}, {pixels} px, mask {row['mask_ratio']:g}: {row['ratio_reference']:.2f}x the "
                f"reference ({row['ratio_equal_text']:.2f}x with equal text; goal {row['goal']}), "
                f"{1e3 * row['ours']['seconds'] / row['images']:.1f} ms an image, {row['ours']['peak_mib']:.0f} MiB "
                f"against {row['reference_eager']['peak_mib']:.0f}, MFU {row['mfu']:.0%}",
                flush=True,
            )
    if options.json:
        dtype = "bf16" if has_fast_bf16(torch.device(options.device)) else "fp32"
        found = {
            "device": torch.cuda.get_device_name() if gpu else "cpu", "preset": options.preset, "autocast": dtype,
            "threads": None if gpu else torch.get_num_threads(), "rows": rows,
        }  # fmt: skip
        if not gpu:
            found["cuda"] = "not measured"
        print(json.dumps(found))
    elif not gpu:
        print("on a GPU (XL/2, 256 and 512 px): not measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
