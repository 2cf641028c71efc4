"""Pictures from a network of the real shape: ours beside the plain loop, on equal noise and captions, in turns.

    python -m benchmarks.generate [--device cuda] [--preset xl_2] [--pixels 512] [--images 16] [--steps 30] [--json]

ours       `model.edm.EDM.sample` in bfloat16 weights, as `MicroDiTPipeline` calls it: captions padded to the longest,
           with a mask; as many pictures together as the pipeline takes
plain      the official code's way: float32 weights under autocast, captions padded to 77 without a mask, experts by
           products with one-hot matrices, Heun's steps written out

Latents only: decoding is the same for both. First the two are checked equal in fp32, for equal captions, within
TOLERANCE of the deviation. Weights are random. `ratio_plain` = plain / ours, in seconds. `samplers`: the network calls
and seconds of ours with each sampler at as many steps, and the half of them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import microdit.model.layers
from benchmarks.experts import one_hot_experts
from benchmarks.harness import argument_parser, print_figures
from benchmarks.train_step import SIZES, TEXT, plain_attention
from microdit.model.edm import EDM
from microdit.model.layers import Experts
from microdit.model.network import MicroDiT
from microdit.model.samplers import SAMPLERS
from microdit.model.text_to_image import CPU_TOKENS, GPU_TOKENS

TOLERANCE = 1e-3
GUIDANCE = 5.0
LENGTHS = (8, 49)  # tokens of a caption, as T5 gives them


def make_network(preset: str, pixels: int, device: str) -> MicroDiT:
    """Build a network with random weights, its output layer too, which starts as zero."""
    torch.manual_seed(0)
    with torch.device(device):
        net = MicroDiT(**SIZES[preset] | {"input_size": pixels // 8, "caption_channels": 1024})
        nn.init.normal_(net.final_layer.linear.weight, std=0.02)
    return net.eval().requires_grad_(False)


def plain_sample(net: MicroDiT, noise: Tensor, y: Tensor, steps: int, autocast: bool) -> Tensor:
    """Sample by Heun's method with classifier-free guidance, written out: the algorithm of arXiv 2206.00364."""
    edm, calls = EDM(), {module: module.forward for module in net.modules() if isinstance(module, Experts)}

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        skip, out, scale, level = edm.preconditioning(sigma.float().reshape(1))
        both = (scale * x.float()).repeat(2, 1, 1, 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            f = net(both, level.repeat(len(both)), torch.cat([y, torch.zeros_like(y)]))["sample"].float()
        conditional, unconditional = f.chunk(2)
        return (skip * x.float() + out * (unconditional + GUIDANCE * (conditional - unconditional))).double()

    ours, microdit.model.layers.attention = microdit.model.layers.attention, plain_attention
    for module in calls:
        module.forward = partial(one_hot_experts, module)  # type: ignore[method-assign]
    try:
        sigmas = edm.sigmas(steps).to(noise.device)
        x = noise.double() * sigmas[0]
        for now, following in pairwise(sigmas):
            slope = (x - denoised(x, now)) / now
            ahead = x + (following - now) * slope
            if following > 0:
                slope = (slope + (ahead - denoised(ahead, following)) / following) / 2
                ahead = x + (following - now) * slope
            x = ahead
        return x.float()
    finally:
        microdit.model.layers.attention = ours
        for module, forward in calls.items():
            module.forward = forward  # type: ignore[method-assign]


def timed(device: str, work: Callable[[], object]) -> float:
    """Measure the seconds that `work` takes; processor seconds on a CPU, which other programs disturb little."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Check the two ways against each other, time them in turns, then the samplers."""
    device, side = options.device, options.pixels // 8
    net = make_network(options.preset, options.pixels, device)
    half = device == "cuda"
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(options.images, net.in_channels, side, side, generator=generator).to(device)
    text = torch.randn(options.images, TEXT, net.caption_channels, generator=generator).to(device)
    lengths = torch.randint(*LENGTHS, (options.images,), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    padded = text * (torch.arange(TEXT) < lengths[:, None]).to(device)[..., None]

    same = EDM().sample(net, noise[:1], text[:1], num_inference_steps=2, guidance_scale=GUIDANCE)
    difference = ((same - plain_sample(net, noise[:1], text[:1], 2, False)).square().mean().sqrt() / same.std()).item()
    if difference > TOLERANCE:
        raise SystemExit(f"for equal inputs the two ways differ by {difference:.2g} of the deviation")

    fast = make_network(options.preset, options.pixels, device).to(torch.bfloat16 if half else torch.float32)
    tokens = (side // net.patch_size) ** 2
    together = max(1, (GPU_TOKENS if half else CPU_TOKENS) // tokens)

    def ours(steps: int = options.steps, sampler: str = "heun") -> None:
        for i in range(0, options.images, together):
            rows = slice(i, i + together)
            y = padded[rows, : mask.shape[1]].to(fast.pos_embed.dtype)
            EDM().sample(
                fast, noise[rows], y, text_mask=mask[rows], num_inference_steps=steps, guidance_scale=GUIDANCE,
                sampler=sampler,
            )  # fmt: skip

    def plain() -> None:
        for i in range(0, options.images, together):
            plain_sample(net, noise[i : i + together], padded[i : i + together], options.steps, half)

    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(options.rounds + 1):  # the first one warms up
        for name, way in (("ours", ours), ("plain", plain)):
            took = timed(device, way)
            if number:
                seconds[name].append(took)
    best = {name: statistics.median(took) for name, took in seconds.items()}
    return {
        "device": torch.cuda.get_device_name() if half else "cpu",
        "preset": options.preset,
        "pixels": options.pixels,
        "images": options.images,
        "together": together,
        "steps": options.steps,
        "difference": difference,
        "ours_images_per_second": round(options.images / best["ours"], 3),
        "plain_images_per_second": round(options.images / best["plain"], 3),
        "ratio_plain": round(best["plain"] / best["ours"], 3),
        "peak_gpu_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6) if half else "not measured",
        "samplers": time_samplers(fast, ours, options.steps, -(-options.images // together), device),
    }


def time_samplers(
    net: MicroDiT, sample: Callable[[int, str], None], steps: int, batches: int, device: str
) -> dict[str, dict[str, float]]:
    """Time each sampler at `steps` steps and at half of them, and count its network calls for a picture."""
    samplers: dict[str, dict[str, float]] = {}
    for name in SAMPLERS:
        for count in (steps, max(1, steps // 2)):
            calls: list[None] = []
            hook = net.register_forward_hook(lambda *_, calls=calls: calls.append(None))
            took = timed(device, partial(sample, count, name))
            hook.remove()
            samplers[f"{name} {count}"] = {"calls": len(calls) // batches, "seconds": round(took, 3)}
    return samplers


def main(arguments: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", choices=tuple(SIZES), help="default: xl_2 on a GPU, tiny_2 on a CPU")
    parser.add_argument("--pixels", type=int, help="default: 512 on a GPU, 64 on a CPU")
    parser.add_argument("--images", type=int, help="default: 32 on a GPU, 4 on a CPU")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.preset = options.preset or ("xl_2" if gpu else "tiny_2")
    options.pixels, options.images = options.pixels or (512 if gpu else 64), options.images or (32 if gpu else 4)
    print_figures(measure(options), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
