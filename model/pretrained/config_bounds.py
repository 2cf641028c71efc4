"""Hold a model's config against bounds and against its weights, before a library builds what it describes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Each layer is a module that takes time to build, on the meta device too; widths cost nothing there.
LAYERS, WIDTH = 1000, 1 << 24
COUNTS_LAYERS = re.compile(r"(^|_)(n_?)?(layers?|blocks?|depths?|stages|experts)($|_)")
IS_WIDTH = re.compile(r"(^|_)(size|dim|channels|width|heads|positions|embeddings|groups)$")
SPARE = 1 << 24  # parameters that files may lack, such as a pooler's


def check_config(config: Mapping[str, Any]) -> None:
    """Check counts of layers and widths, at any depth.

    Raises:
        ValueError: one is beyond all bounds.
    """
    open_values: list[tuple[str, Any]] = [("", config)]
    while open_values:
        name, value = open_values.pop()
        if isinstance(value, Mapping):
            open_values += [(str(key), each) for key, each in value.items()]
        elif isinstance(value, list):
            if COUNTS_LAYERS.search(name) and len(value) > LAYERS:
                raise ValueError(f"{name} has {len(value)} entries, expected at most {LAYERS}")
            open_values += [(name, each) for each in value]
        elif isinstance(value, int):
            most = WIDTH if IS_WIDTH.search(name) else LAYERS if COUNTS_LAYERS.search(name) else None
            if most is not None and abs(value) > most:
                raise ValueError(f"{name} = {value!r:.40}, expected at most {most}")


def check_size(build: Callable[[], nn.Module], weights: int) -> None:
    """Build a model without memory for its weights, and hold their number against the bytes of its files.

    Raises:
        ValueError: there are more weights than the files can hold, or no model can be built.
    """
    import torch

    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in build().parameters())
    except (RuntimeError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise ValueError(f"no model can be built from it: {str(error)[:200]}") from error
    if count > weights + SPARE:
        raise ValueError(f"it describes {count:,} weights, and the files of weights have {weights:,} bytes")
