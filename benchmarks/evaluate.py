"""Measure evaluation: features a second against torch-fidelity's loop, drawing against the bare pipeline, memory.

    python -m benchmarks.evaluate [--pictures 300] [--prompts 48] [--features 50000] [--tools DIR] [--json]

Inception has random weights of the real shapes; pictures, cores and batch are the same for both, and loading does not
count. torch-fidelity lives in an environment of its own, which is made in DIR with pip once (2 GB). Goals:
`ratio_fidelity` 1.5, `ratio_bare` 0.95.
"""

import random
import resource
import subprocess
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import argument_parser, print_figures
from benchmarks.photographs import photograph
from microdit.model.pretrained.inception import Inception, inception_of
from microdit.pipeline.evaluation.drawing import draw_missing
from microdit.pipeline.evaluation.feature_sets import FeatureSet, frechet_of_sets
from microdit.pipeline.evaluation.features import BATCH, Extractor
from microdit.pipeline.evaluation.metrics import kid
from microdit.pipeline.evaluation.picture_sets import open_pictures
from microdit.pipeline.evaluation.resizing import PROTOCOLS
from tests.model.tiny import write_run

TOOLS = ["torch-fidelity==0.4.0", "torch", "torchvision"]
SIDE = 256


def tools(folder: Path) -> Path:
    """Make an environment with torch-fidelity, if there is none yet; give its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *TOOLS], check=True)
    return python


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Fill Inception's shapes with numbers that keep activations in range."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in {
        **Inception().state_dict(),
        **{"fc.weight": torch.ones(1008, 2048), "fc.bias": torch.ones(1008)},
    }.items():
        if name.endswith("conv.weight"):
            value = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        weights[name] = value
    return weights


def features_per_second(pictures: int, threads: int, python: Path) -> dict[str, float]:
    """Time both on the same pictures: ours with torch-fidelity's resizing."""
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name) / "pictures", Path(name) / "weights.pth"
        folder.mkdir()
        draw = random.Random(1)
        for i in range(pictures):
            path = folder / f"{i:05}.png"
            path.write_bytes(photograph(draw))
            Image.open(path).resize((SIDE, SIDE)).save(path)
        state = random_weights(1)
        torch.save(state, weights)
        command = [python, Path(__file__).with_name("evaluate_tools.py"), folder, weights, BATCH, threads]
        theirs = pictures / float(subprocess.run(list(map(str, command)), check=True, capture_output=True).stdout)
        extractor = Extractor("inception", "", PROTOCOLS["torch-fidelity"], inception_of(state))
        some = open_pictures(folder, "pictures")
        rates = []
        for _ in range(2):
            began = time.monotonic()
            count = sum(len(batch) for batch in extractor.extract(some.pixels()))
            rates.append(count / (time.monotonic() - began))
    return {"features_per_second": rates[-1], "features_per_second_torch_fidelity": theirs}


def drawing_ratio(prompts: int) -> dict[str, float]:
    """Time drawing into a folder against the bare call of the pipeline: a tiny network, in turns."""
    from microdit.model.text_to_image import MicroDiTPipeline

    options: dict[str, Any] = {"num_inference_steps": 20, "sampler": "heun", "guidance_scale": 2.0}
    texts = [f"picture {i}" for i in range(prompts)]
    with tempfile.TemporaryDirectory() as name:
        pipe = MicroDiTPipeline.from_pretrained(write_run(Path(name) / "run"))
        pipe.set_progress_bar_config(disable=True)
        bare, whole = [], []
        for turn in range(3):
            began = time.monotonic()
            pipe(texts, seed=0, **options)
            bare.append(time.monotonic() - began)
            began = time.monotonic()
            draw_missing(pipe, texts, Path(name) / str(turn), options=options)
            whole.append(time.monotonic() - began)
    return {"pictures_per_second": prompts / min(whole), "ratio_bare": min(bare) / min(whole)}


def large_sets(count: int) -> dict[str, float]:
    """FID with its error, and KID, of two sets of 2,048 features: seconds, and memory beyond the features."""
    numbers = np.random.default_rng(0)
    first, second = (FeatureSet(numbers.standard_normal((count, 2048), np.float32)) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    frechet_of_sets(first, second)
    once = time.monotonic() - began
    began = time.monotonic()
    kid(first, second)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"fid_seconds": once, "kid_seconds": time.monotonic() - began, "memory_beyond_features_mb": peak / 1024}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--features", type=int, default=50_000)
    parser.add_argument("--tools", type=Path, default=Path.home() / ".cache" / "microdit" / "evaluate-tools")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    figures: dict[str, float] = {}
    if options.pictures:
        figures |= features_per_second(options.pictures, threads, tools(options.tools))
        figures["ratio_fidelity"] = figures["features_per_second"] / figures["features_per_second_torch_fidelity"]
    figures |= drawing_ratio(options.prompts) | large_sets(options.features)
    print_figures({"threads": threads, **{name: round(value, 3) for name, value in figures.items()}}, options.json)


if __name__ == "__main__":
    main()
