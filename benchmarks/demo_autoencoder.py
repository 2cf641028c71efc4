"""Train the demo's autoencoder: a diffusers AutoencoderKL (f8, 4 latent channels) small enough to ship, on OpenMoji.

    python benchmarks/demo_autoencoder.py --minutes 60 --out model/pretrained/demo_autoencoder
    python benchmarks/demo_autoencoder.py --minutes 0 --init model/pretrained/demo_autoencoder --json   # only measures

Figures are for drawings that training never sees (a seeded 5% of those that have names, skin tones of them included):
mean over images of the PSNR of the uint8 image, at 64 and at 128 pixels, from the posterior's mean and from a sample.
Every checkpoint is the averaged weights (EMA), complete and usable; the last one ends a cosine over the time given.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from benchmarks.harness import argument_parser, print_figures
from microdit.pipeline.sources.openmoji import drawings as openmoji

SIZES = (64, 128)
VARIANTS = {64: 6, 128: 4}  # rasters of each drawing to train on: one as it is, the others moved, turned and scaled
BATCH = {64: 16, 128: 4}  # images per step; both sizes cost about the same
HELD_OUT = 0.05
SPLIT_SEED = 2411
LATENT_STD = 0.9  # what EDM calls sigma_data: latents leave the autoencoder with this standard deviation
KL_WEIGHT = 1e-5
LOG_FLOOR = 5e-4  # the loss is the mean of log(MSE + this): PSNR itself, until an image is about 39 dB good
ROUGHNESS_WEIGHT = 0.3  # of the log of how much neighbouring latents differ
NOISY_WEIGHT, NOISE = 0.5, (0.2, 0.8)  # of the loss from noisy latents; the noise, in deviations of their channel
EMA_DECAY = 0.998
WARM_UP_STEPS = 200
MAX_FOLDER_BYTES = 4_000_000


def build(channels: tuple[int, ...]) -> AutoencoderKL:
    """Return the untrained autoencoder: one residual block per level, no attention, group norms of eight groups."""
    levels = len(channels)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
        force_upcast=False,
    )
    with torch.no_grad():  # begin with a narrow posterior: noise of std 1 would drown the first thousand steps
        vae.quant_conv.bias[4:] = -6.0
    return vae


def split() -> tuple[list[str], list[str]]:
    """Return (codes to train on, codes held out). Variants of the held out, in skin tone or spelling, are in none."""
    named = [item.code for item in openmoji.catalogue()]
    held_out = sorted(random.Random(SPLIT_SEED).sample(named, round(HELD_OUT * len(named))))
    hidden = {openmoji.base_character(code) for code in held_out}
    unnamed = [code for code in openmoji.svg_files() if openmoji.characters(code) == openmoji.base_character(code)]
    return [code for code in unnamed if openmoji.base_character(code) not in hidden], held_out


def _pixels(job: tuple[str, int, str | None]) -> np.ndarray:
    svg, size, transform = job
    return np.asarray(openmoji.rasterise(svg, size, transform))


def _transform(rng: random.Random) -> str:
    scale = rng.uniform(0.75, 1.2)
    return (
        f"translate({36 + rng.uniform(-5, 5):.2f} {36 + rng.uniform(-5, 5):.2f}) rotate({rng.uniform(-25, 25):.1f}) "
        f"scale({scale * rng.uniform(0.93, 1.07):.3f} {scale:.3f}) translate(-36 -36)"
    )


def rasters(codes: list[str], size: int, variants: int, seed: int = 0) -> Tensor:
    """Draw uint8 (len(codes) * variants, 3, size, size); the first len(codes) are the drawings as they are."""
    files = openmoji.svg_files()
    svgs = [files[code].read_text() for code in codes]
    rng = random.Random(f"{seed}-{size}")
    jobs = [(svg, size, _transform(rng) if variant else None) for variant in range(variants) for svg in svgs]
    out = torch.empty((len(jobs), 3, size, size), dtype=torch.uint8)
    for index, pixels in enumerate(openmoji.in_processes(_pixels, jobs)):
        out[index] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return out


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 0..255 to float32 -1..1."""
    return images.float() / 127.5 - 1


def batches(images: Tensor, count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield training batches without end, float32 (size, 3, H, W): flips, turns, colours swapped half the time.

    The first `count` images (the drawings as they are) come as often as all the others together.
    """

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    while True:
        index = [below(count) if below(2) else below(len(images)) for _ in range(size)]
        batch = []
        for image in images[index]:
            if below(2):
                image = image.flip(-1)
            if below(3) == 0:
                image = image.rot90(below(4), (-2, -1))
            if below(2):
                image = image[torch.randperm(3, generator=generator)]
            batch.append(image)
        yield to_float(torch.stack(batch))


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor, sampled: bool = False) -> float:
    """Mean over images of 10 log10(255^2 / MSE), of what comes back rounded to uint8; images: uint8 (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for chunk in images.split(32):
        posterior = vae.encode(to_float(chunk)).latent_dist
        latents = posterior.sample(generator) if sampled else posterior.mean
        back = ((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255)
        values.append(10 * torch.log10(255**2 / (back - chunk.float()).square().mean((1, 2, 3))))
    return float(torch.cat(values).mean())


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, images: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the latents of `images`, and the posterior's standard deviation."""
    posteriors = [vae.encode(to_float(chunk)).latent_dist for chunk in images.split(64)]
    means = torch.cat([p.mean.flatten() for p in posteriors])
    spread = torch.cat([p.std.flatten() for p in posteriors])
    return {
        "latent_mean": float(means.mean()),
        "latent_std": float((means.var() + spread.square().mean()).sqrt()),
        "latent_max": float(means.abs().max()),
        "posterior_std": float(spread.mean()),
        "neighbour_correlation": 1 - float(roughness(torch.cat([p.mean for p in posteriors]))),
    }


def objective(vae: AutoencoderKL, images: Tensor, noisy: bool) -> Tensor:
    """Mean over images of log(MSE), which is PSNR up to a factor, with terms that make latents easy to learn.

    images: float32 (B, 3, H, W). Where neighbouring latents are alike, most of their variance says what the picture
    looks like from afar, and a diffusion model learns that first. noisy: decode noisy latents too, as a young one makes
    them; without that the details hide in differences too small to be learned.
    """
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        loss = log_mse(vae.decode(latents).sample, images)
        if noisy:
            low, high = NOISE
            deviation = (low + (high - low) * torch.rand(len(latents), 1, 1, 1)) * latents.float().std(
                (0, 2, 3), keepdim=True
            )
            spoiled = vae.decode(latents + deviation * torch.randn_like(latents)).sample
            loss = loss + NOISY_WEIGHT * log_mse(spoiled, images)
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float())
    # KL of 256 latents, what a 64-pixel image has: larger images have more, and as much more to say
    return loss + ROUGHNESS_WEIGHT * roughness(posterior.mean.float()).log() + KL_WEIGHT * 256 * kl.mean()


def log_mse(back: Tensor, images: Tensor) -> Tensor:
    """Mean over images of log(MSE + LOG_FLOOR), float32."""
    return ((back.float() - images).square().mean((1, 2, 3)) + LOG_FLOOR).log().mean()


def roughness(latents: Tensor) -> Tensor:
    """Compute one minus the correlation of neighbours, mean over channels; latents: (B, C, H, W)."""
    steps = [latents.diff(dim=dim).square().mean((0, 2, 3)) for dim in (2, 3)]
    return ((steps[0] + steps[1]) / 4 / latents.var((0, 2, 3))).mean()


def orthogonalised(update: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix to `update` (rows, columns), by five Newton-Schulz steps.

    Muon's step (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), its coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = update if update.shape[0] <= update.shape[1] else update.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if update.shape[0] <= update.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: for convolution weights, seen as matrices (out, in * 3 * 3)."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # a closure is not called: nobody here has one
        for group in self.param_groups:
            for weight in group["params"]:
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                matrix = weight.grad.lerp(buffer, group["momentum"]).flatten(1)
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                weight.add_(orthogonalised(matrix).view_as(weight), alpha=-group["lr"] * scale)


def save(vae: AutoencoderKL, out: Path, scaling: float) -> int:
    """Write the diffusers folder in fp16 and return its size in bytes."""
    copy = AutoencoderKL.from_config(vae.config)
    copy.load_state_dict(vae.state_dict())
    copy.register_to_config(scaling_factor=scaling)
    copy.half().save_pretrained(out, safe_serialization=True)
    config = json.loads((out / "config.json").read_text())
    config.pop("_name_or_path", None)  # where this machine had it
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sum(path.stat().st_size for path in out.iterdir() if path.is_file())


def measure(vae: AutoencoderKL, held_out: dict[int, Tensor]) -> dict[str, float]:
    """Held-out PSNR by size, from the mean and from a sample."""
    result = {}
    for size, images in held_out.items():
        result[f"psnr_{size}"] = round(psnr(vae, images), 2)
        result[f"psnr_{size}_sampled"] = round(psnr(vae, images, sampled=True), 2)
    return result


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=50.0, help="wall time to train (0: only measure --init)")
    parser.add_argument("--out", type=Path, help="folder for the diffusers autoencoder, written every few minutes")
    parser.add_argument("--init", type=Path, help="begin with the weights of this folder")
    parser.add_argument("--channels", default="16,32,64,96", help="block_out_channels of the four levels")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's peak rate; AdamW's is a tenth")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.minutes <= 0 and args.init is None:
        parser.error("--minutes 0 measures weights that exist: give their folder with --init")
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.init) if args.init else build(tuple(map(int, args.channels.split(","))))
    training_codes, held_out_codes = split()
    held_out = {size: rasters(held_out_codes, size, 1) for size in SIZES}
    result: dict[str, float] = {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "held_out_images": len(held_out_codes),
        "training_images": len(training_codes),
    }
    if args.minutes > 0:
        result |= train(vae, training_codes, held_out, args)
    result |= measure(vae, held_out)
    result |= latent_statistics(vae, rasters(training_codes, 64, 1))
    scaling = LATENT_STD / result["latent_std"]
    result["scaling_factor"] = scaling
    if args.out:
        result["folder_bytes"] = save(vae, args.out, scaling)
        if result["folder_bytes"] > MAX_FOLDER_BYTES:
            sys.exit(f"{args.out} has {result['folder_bytes']} bytes; the demo ships at most {MAX_FOLDER_BYTES}")
    print_figures(result, args.json)


def split_parameters(vae: AutoencoderKL) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Split into the inner convolutions, for Muon, and the rest (first and last convolutions, norms, biases)."""
    inner = ("down_blocks", "up_blocks", "mid_block")
    matrices = [p for name, p in vae.named_parameters() if p.ndim == 4 and any(part in name for part in inner)]
    known = {id(p) for p in matrices}
    return matrices, [p for p in vae.parameters() if id(p) not in known]


def train(
    vae: AutoencoderKL, codes: list[str], held_out: dict[int, Tensor], args: argparse.Namespace
) -> dict[str, float]:
    """Train for args.minutes of wall time, and leave the averaged weights in `vae`."""
    data = {size: rasters(codes, size, VARIANTS[size], args.seed) for size in SIZES}
    print(f"{len(codes)} drawings, {sum(map(len, data.values()))} rasters", file=sys.stderr, flush=True)
    average = AutoencoderKL.from_config(vae.config)
    average.load_state_dict(vae.state_dict())
    matrices, others = split_parameters(vae)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=args.lr),
        torch.optim.AdamW(others, lr=args.lr / 10, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    peaks = [args.lr, args.lr / 10]
    streams = {
        size: batches(images, len(codes), BATCH[size], torch.Generator().manual_seed(args.seed + size))
        for size, images in data.items()
    }
    weights = list(vae.parameters())

    def gradients(size: int) -> tuple[float, tuple[Tensor, ...]]:
        loss = objective(vae, next(streams[size]), noisy=size == min(SIZES))
        return float(loss.detach()), torch.autograd.grad(loss, weights)

    start = last_check = time.monotonic()
    step = 0
    vae.train()
    # One thread for each size, at the same time: on two cores that are not ours alone this is up to nine times as fast
    # as both cores working on one operation, where each waits for the other some thousand times a step.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(len(SIZES), initializer=torch.set_num_threads, initargs=(1,))
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        losses, parts = zip(*pool.map(gradients, SIZES), strict=True)
        for weight, *grads in zip(weights, *parts, strict=True):
            weight.grad = torch.stack(grads).mean(0)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        now = time.monotonic()
        if now - last_check > max(60.0, min(240.0, 6 * args.minutes)):
            last_check = now
            figures = measure(average, held_out)
            line = {"minutes": round((now - start) / 60, 1), "step": step, "loss": round(sum(losses) / len(losses), 3)}
            print(json.dumps(line | figures), file=sys.stderr, flush=True)
            if args.out:
                scaling = LATENT_STD / latent_statistics(average, data[64][: len(codes)])["latent_std"]
                save(average, args.out, scaling)
    pool.shutdown()
    vae.load_state_dict(average.state_dict())
    vae.eval()
    return {"minutes": args.minutes, "steps": step, "images_seen": step * sum(BATCH.values())}


if __name__ == "__main__":
    main()
