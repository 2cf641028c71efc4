"""Check the arguments of a network that come out of a file, before anything of their size is built."""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from microdit.model.network import MicroDiT

# Far above the released sizes (28 blocks, width 1024, 64 x 64 latents). A network is built on the meta device, where
# only its number of modules costs time; the table of positions is computed and stands in no file.
BLOCKS = 1000
WIDTH = 1 << 17
SIDE = 1 << 13
RATIO = 1000.0
POSITIONS = 1 << 28  # numbers in the table of positions: 1 GiB
BOUNDS = {
    "input_size": SIDE, "patch_size": 64, "in_channels": 4096, "depth": BLOCKS, "patch_mixer_depth": BLOCKS,
    "num_experts": 1024, "experts_every_n": BLOCKS,
}  # fmt: skip
MAY_BE_ZERO = ("patch_mixer_depth", "experts_every_n")


def check_network_config(config: Mapping[str, Any]) -> None:
    """Check kinds and bounds.

    Raises:
        ValueError: an argument is none of the network's, of another kind, or out of bounds.
    """
    kinds = typing.get_type_hints(MicroDiT.__init__)
    for name, value in config.items():
        if name not in kinds or name == "return":
            raise ValueError(f"{name!r:.80} is no argument of MicroDiT")
        _check(name, kinds[name], value)
    side = config.get("input_size", 32) // config.get("patch_size", 2)
    if side**2 * config.get("dim", 1024) > POSITIONS:
        raise ValueError(f"input_size={config.get('input_size', 32)} is too large: {side} x {side} positions")


def _check(name: str, kind: Any, value: Any) -> None:
    if isinstance(kind, types.UnionType):  # a sequence of numbers, or None
        if value is None:
            return
        if not isinstance(value, Sequence) or isinstance(value, str) or not 1 <= len(value) <= BLOCKS:
            raise ValueError(f"{name}={value!r:.80}: expected a list of 1 to {BLOCKS} numbers")
        for each in value:
            _check_number(f"a number of {name}", each, RATIO)
    elif kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r:.80}: expected true or false")
    elif kind is int:
        least, most = 0 if name in MAY_BE_ZERO else 1, BOUNDS.get(name, WIDTH)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name}={value!r:.80}: expected a whole number of {least} to {most}")
    else:
        _check_number(name, value, RATIO)


def _check_number(name: str, value: Any, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most or math.isnan(value):
        raise ValueError(f"{name}={value!r:.80}: expected a number above 0, at most {most:g}")
