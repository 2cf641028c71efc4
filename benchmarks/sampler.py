"""Samplers: network calls and time against the distance to the 200-step result.

    python -m benchmarks.sampler [--json] [--checkpoint FILE --text FILE.npy] [--guidance-scale 5]

Distance is the root mean square difference to 200 steps of heun (399 calls), over the deviation of that result. On a
CPU time is the processor's, of all threads together, so that other programs on the machine disturb it little. Without a
checkpoint, a small network is first trained (400 steps) on generated shapes in eight colours, one caption per colour.
`--text`: caption embeddings (n, L, Ccap), float, of the text encoder that the checkpoint was trained with.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import argument_parser
from microdit.model.checkpoint import load_model
from microdit.model.edm import EDM
from microdit.model.network import MicroDiT
from microdit.model.samplers import SAMPLERS

REFERENCE_STEPS = 200
STEPS = {"heun": (5, 8, 12, 18, 30, 50), "other": (8, 12, 16, 20, 24, 30, 40, 60)}
CAPTIONS = 8


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw latents (count, 4, 16, 16) of one disc or square on a soft slope, and the colour (count,) of each."""
    grid = torch.linspace(-1, 1, 16)
    rows, columns = grid.view(1, 16, 1), grid.view(1, 1, 16)
    place = torch.rand(count, 4, generator=generator)
    down, right = (rows - place[:, :1, None] + 0.5).abs(), (columns - place[:, 1:2, None] + 0.5).abs()
    radius = 0.3 + 0.4 * place[:, 2:3, None]
    round_ = (place[:, 3] < 0.5).view(-1, 1, 1)
    distance = torch.where(round_, (down**2 + right**2).sqrt(), torch.maximum(down, right))
    inside = torch.sigmoid((radius - distance) * 12).unsqueeze(1)
    colour = torch.randint(CAPTIONS, (count,), generator=generator)
    paint = torch.randn(CAPTIONS, 4, generator=torch.Generator().manual_seed(7))[colour].view(-1, 4, 1, 1)
    slope = (rows * place[:, :1, None] + columns * place[:, 1:2, None]).unsqueeze(1)
    return 0.9 * (inside * paint + (1 - inside) * slope), colour


def train(steps: int) -> tuple[MicroDiT, Tensor]:
    """Train a small network that knows the shapes, and return the eight captions' embeddings (8, 2, 16) too."""
    torch.manual_seed(0)
    text = torch.randn(CAPTIONS, 2, 16)
    net = MicroDiT(
        input_size=16, dim=96, depth=4, head_dim=32, multiple_of=32, caption_channels=16, patch_mixer_dim=96,
        patch_mixer_depth=2, num_experts=4,
    )  # fmt: skip
    edm, generator = EDM(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        x0, colour = shapes(64, generator)
        keep = (torch.rand(64, 1, 1, generator=generator) > 0.1).float()
        sigma = edm.sigma_from_normal(torch.randn(64, generator=generator), -0.6, 1.2)
        noise = torch.randn(x0.shape, generator=generator)
        optimizer.zero_grad()
        edm.loss(net, x0, text[colour] * keep, sigma=sigma, noise=noise).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval(), text


def measure(net: MicroDiT, latents: Tensor, y: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    clock = time.perf_counter if latents.is_cuda else time.process_time

    def run(sampler: str, steps: int) -> tuple[Tensor, dict[str, Any]]:
        calls, start = 0, clock()

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        hook = net.register_forward_hook(count)
        out = EDM().sample(
            net, latents, y, num_inference_steps=steps, guidance_scale=options.guidance_scale, sampler=sampler,
            guidance_interval=options.guidance_interval,
        )  # fmt: skip
        if out.is_cuda:
            torch.cuda.synchronize()
        hook.remove()
        return out, {"sampler": sampler, "steps": steps, "calls": calls, "seconds": clock() - start}

    reference, row = run("heun", REFERENCE_STEPS)
    deviation, rows = reference.std(), []
    for sampler in SAMPLERS:
        for steps in STEPS.get(sampler, STEPS["other"]):
            out, row = run(sampler, steps)
            row["distance"] = ((out - reference).square().mean().sqrt() / deviation).item()
            rows.append(row)
    released = next(r for r in rows if r["sampler"] == "heun" and r["steps"] == 30)
    near = [r for r in rows if r["distance"] <= released["distance"]]
    reached = {name: min((r["calls"] for r in near if r["sampler"] == name), default=None) for name in SAMPLERS}
    return {"rows": rows, "calls_to_reach_heun_30": reached, "calls_of_heun_30": released["calls"]}


def main(arguments: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help=".pt or .safetensors")
    parser.add_argument("--text", type=Path, help="caption embeddings (.npy) for --checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="in sigma")
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--train-steps", type=int, default=400, help="of the small network")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) != (options.text is None):
        parser.error("--checkpoint and --text go together")
    if options.checkpoint is None:
        net, text = train(options.train_steps)
    else:
        net, text = load_model(options.checkpoint), torch.from_numpy(np.load(options.text, allow_pickle=False)).float()
    net = net.to(options.device)
    side = net.config["input_size"]
    latents = torch.randn(options.batch, net.in_channels, side, side, generator=torch.Generator().manual_seed(2))
    y = text[torch.arange(options.batch) % len(text)].to(options.device)
    result = measure(net, latents.to(options.device), y, options)
    if options.json:
        print(json.dumps({"device": options.device, "guidance_scale": options.guidance_scale, **result}))
        return 0
    print("sampler    steps calls seconds distance")
    for row in result["rows"]:
        print(f"{row['sampler']:10} {row['steps']:5} {row['calls']:5} {row['seconds']:7.2f} {row['distance']:8.5f}")
    print(f"calls to come as near as heun with 30 steps ({result['calls_of_heun_30']}):", end=" ")
    print(", ".join(f"{name} {calls}" for name, calls in result["calls_to_reach_heun_30"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
