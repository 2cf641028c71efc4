"""Known figures of models and machines: shapes, arithmetic work, GPUs, and the table of measured rates.

`rates.json` is that table. An entry is one figure of one benchmark: `stage` (`ingest`, `captions`, `scores`, `latents`,
`text`), `model` and `resolutions` (all that are made together) where it has them, `device` (`cpu`, or a kind of
`GPUS`), `rate` (samples a second of one GPU, or of one busy core), and where it comes from: `command`, `machine`,
`date`, `note`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.block import Options

CPU = "cpu"
UTILISATION = 0.5
"""The part of a GPU's peak that a model is assumed to reach in estimates by arithmetic; not measured."""


class Rate(Options):
    """An entry of the table."""

    stage: str
    model: str = ""
    resolutions: tuple[int, ...] = ()
    device: str
    rate: float
    command: str
    machine: str
    date: str
    note: str = ""

    @property
    def origin(self) -> str:
        """Describe the figure's origin in words."""
        note = f", {self.note}" if self.note else ""
        return f"measured table: `{self.command}`, {self.machine}{note}, {self.date}"


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    tflops: float
    """Dense bfloat16 TFLOP/s of its data sheet."""
    price: float | None = None
    """Dollars of an hour that an estimate assumes,"""
    why: str = ""
    """and their source."""


# Prices are reported by others, no quotes.
GPUS = {
    "a100": Gpu(312),
    "h100": Gpu(989, 3.75, "what the paper's authors count for an hour of theirs, 2024"),
    "h200": Gpu(989, 1.95, "768 hours for $1,500 in a published training, 2026"),
    "l4": Gpu(121),
    "l40s": Gpu(362),
    "rtx4090": Gpu(165),
}


# channels, and the factor by which the sides are reduced
AUTOENCODERS = {"demo": (4, 8), "sdxl": (4, 8), "sdxl-fp16-fix": (4, 8), "ostris": (16, 8), "flux2": (128, 16)}


@dataclass(frozen=True)
class Encoder:
    """A text encoder."""

    width: int
    """Of a token."""
    tokens: int
    """Of a caption, at most."""
    always: bool = False
    """Every caption has so many tokens."""
    weights: float | None = None
    """Billions of weights that each token is multiplied with."""


ENCODERS = {
    "minilm": Encoder(384, 128),
    # 24 layers of 4 x 4096^2 and 3 x 4096 x 10240
    "t5-xxl": Encoder(4096, 120, weights=4.63),
    # 24 layers of 12 x 1024^2
    "dfn-clip-h": Encoder(1024, 77, always=True, weights=0.302),
    "gemma-2-2b-it": Encoder(2304, 256),
    "qwen3-0.6b": Encoder(1024, 256),
    "qwen3-4b": Encoder(2560, 256),
}


# TFLOP of encoding one image, by resolution
AUTOENCODER_TFLOP = {"sdxl": {256: 0.273, 512: 1.117}, "sdxl-fp16-fix": {256: 0.273, 512: 1.117}}


@cache
def table() -> tuple[Rate, ...]:
    """Read the measured table."""
    entries = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return tuple(TypeAdapter(list[Rate]).validate_python(entries))


def measured(stage: str, device: str, model: str = "", resolutions: Sequence[int] = ()) -> Rate | None:
    """Find the newest figure of exactly these; None if nobody measured it."""
    key = (stage, device, model, sorted(resolutions))
    matching = [rate for rate in table() if (rate.stage, rate.device, rate.model, sorted(rate.resolutions)) == key]
    return max(matching, key=lambda rate: rate.date, default=None)


def gpu_kind(name: str) -> str:
    """Find the kind of GPU by a user's name for it.

    Raises:
        RequestError: it is not known.
    """
    kind = name.lower().replace(" ", "").removeprefix("nvidia")
    if kind not in GPUS:
        raise RequestError(f"--gpu {name}: no such kind is known; expected one of {', '.join(GPUS)}")
    return kind


def is_kind(device: str, kind: str) -> bool:
    """Match a device's own name (`NVIDIA H100 80GB HBM3`) with a kind."""
    name = re.sub(r"(?<=[a-z])(?=\d)", "[ -]?", kind)
    return re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", device.lower()) is not None
