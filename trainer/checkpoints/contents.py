"""Contents of a run's checkpoint; `folder.py` and `bucket.py` keep it. Nothing in it is pickled.

model.safetensors      the weights, with the network's arguments in the header
ema.safetensors        their moving average, of the same form; only if the leg keeps one
ema-2.safetensors ...  those of the second half-life and so on
optimizer.safetensors  AdamW's state, as `<parameter>.exp_avg` and so on
generate.json          what `microdit.model.loading` needs beside the weights
state.json             where the run is, its recipe, name, size and SHA-256 of each other file, and its own SHA-256

The files are the same however many processes the run has, and whether they share the parameters out or not. In a
folder of an earlier version state.json lists no files: those that are there count.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from microdit.model.checkpoint import CheckpointError, read_state_dict, write_state_dict
from microdit.model.loading import INFO
from microdit.model.network import MicroDiT
from microdit.model.sharding import shared_as, whole_tensors
from microdit.model.strict_json import parse_json
from microdit.pipeline.base.digest import sha256_file

VERSION = 1
OPTIMIZER = "optimizer.safetensors"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


# -- writing ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TensorSnapshot:
    """The tensors of a checkpoint's files by file name, in the memory of the machine, and the network's arguments."""

    files: dict[str, dict[str, Tensor]]
    config: dict[str, Any]


def snapshot(
    net: MicroDiT, averages: Sequence[Mapping[str, Tensor]], optimizer: torch.optim.Optimizer, keep: bool = True
) -> TensorSnapshot:
    """Copy what a run has learned, so that further steps do not change it. averages: parameters by name.

    Where the parameters are shared out, all processes have to ask together. keep: False gives an empty one, for those
    that do not write.
    """
    weights = whole_tensors(net.state_dict(), keep, copy_to="cpu")
    files = {"model.safetensors": weights}
    for name, average in zip(_average_names(), averages, strict=False):
        files[name] = weights | whole_tensors(average, keep, copy_to="cpu")
    files[OPTIMIZER] = whole_tensors(_optimizer_tensors(net, optimizer), keep, copy_to="cpu")
    return TensorSnapshot(files, net.config)


def file_names(tensors: TensorSnapshot) -> list[str]:
    """List the files of a checkpoint but state.json, which is written last."""
    return [*tensors.files, INFO]


def write_file(path: Path, name: str, tensors: TensorSnapshot, generate: Mapping[str, Any]) -> None:
    """Write one of `file_names`. Raises OSError."""
    if name == INFO:
        path.write_text(json.dumps(generate, indent=1))
        return
    try:
        write_state_dict(path, tensors.files[name], None if name == OPTIMIZER else tensors.config)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def listed(path: Path) -> dict[str, Any]:
    """Describe a written file for `files` of state.json."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def state_text(step: int, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the text of state.json, with its own hash. files: by name, as `listed` describes them."""
    whole = {"version": VERSION, "step": step, **state, "files": files}
    return json.dumps(whole | {"sha256": _digest(whole)}, indent=1)


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# -- reading ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read: `name` says where, `state` is state.json, the others are tensors by name.

    Pickled, for the other processes, it keeps the tensors' shapes and dtypes alone.
    """

    name: str
    state: dict[str, Any]
    model: dict[str, Tensor]
    averages: list[dict[str, Tensor]]
    optimizer: dict[str, Tensor]

    def __getstate__(self) -> dict[str, Any]:
        def outline(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}

        averages = [outline(average) for average in self.averages]
        return vars(self) | {"model": outline(self.model), "averages": averages, "optimizer": outline(self.optimizer)}


def parse_state(text: str | bytes) -> dict[str, Any]:
    """Read the text of state.json, without its own hash.

    Raises:
        CheckpointError, ValueError, KeyError, TypeError: it is damaged, or not of this version.
    """
    state = dict(parse_json(text))
    if state["version"] != VERSION:
        raise CheckpointError(f"state.json is of version {state['version']}, this trainer reads {VERSION}")
    expected = state.pop("sha256", None)
    if expected is not None and expected != _digest(state):
        raise CheckpointError(f"state.json is damaged: SHA-256 {_digest(state)}, expected {expected}")
    return state


def check_file(path: Path, expected: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError if a file is not the one that was `listed`, OSError if it cannot be read."""
    found = listed(path)
    if found != {key: expected[key] for key in found}:
        raise CheckpointError(f"{name} is damaged: size and SHA-256 are {found}, expected {expected}")


def read(folder: Path, state: dict[str, Any], name: str) -> Checkpoint:
    """Read a checkpoint from its files, which were checked; the tensors are mapped from them.

    Raises:
        CheckpointError, OSError, ValueError, KeyError: it is not whole.
    """
    files = state.get("files")
    averages = [
        read_state_dict(folder / file)
        for file in itertools.takewhile(lambda f: f in files if files else (folder / f).exists(), _average_names())
    ]
    if files is None and len(averages) < (due := _averages_due(state)):
        raise CheckpointError(f"it has {len(averages)} of {due} moving averages")
    model, optimizer = (read_state_dict(folder / file) for file in ("model.safetensors", OPTIMIZER))
    return Checkpoint(name, state, model, averages, optimizer)


def _averages_due(state: Mapping[str, Any]) -> int:
    """Count the averages that a checkpoint must have which does not list its files, as far as that is known."""
    if "recipe" not in state or not state["progress"]["stage_step"]:
        return 0
    leg = state["recipe"]["stages"][state["progress"]["stage"]]
    half_lives = leg.get("ema_half_life")
    if half_lives is None or leg.get("ema_start"):
        return 0
    return len(half_lives) if isinstance(half_lives, list) else 1


def _average_names() -> Iterator[str]:
    """Name the files of moving averages, without end."""
    yield "ema.safetensors"
    yield from (f"ema-{number}.safetensors" for number in itertools.count(2))


def _optimizer_tensors(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in net.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(net: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the first process's saved state into the optimizers of `net`; all have to ask together."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {names[parameter]: i for i, parameter in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        state.setdefault(index[name], {})[kind] = shared_as(order[index[name]].detach(), value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
