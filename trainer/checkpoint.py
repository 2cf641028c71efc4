"""Checkpoints of a run: folders OUT/checkpoints/step-00001200, complete or not there. Nothing in them is pickled.

model.safetensors      the weights, with the network's arguments in the header
ema.safetensors        their moving average, of the same form; only if the stage keeps one
ema-2.safetensors ...  those of the second half-life and so on
optimizer.safetensors  AdamW's state, as `<parameter>.exp_avg` and so on
generate.json          what `model.loading` needs beside the weights
state.json             where the run is, and its recipe
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint import CheckpointError, read_state_dict, write_state_dict
from model.loading import checkpoint_folders
from model.network import MicroDiT

VERSION = 1


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read: `state` is state.json, the others are tensors by name."""

    folder: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    averages: list[dict[str, Tensor]]
    optimizer: dict[str, Tensor]


def save(
    out: Path,
    step: int,
    net: MicroDiT,
    averages: Sequence[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    generate: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of a step, durable when this returns, and drop all but the last `keep`.

    averages: parameters by name. Returns the folder. A kill at any moment leaves the checkpoints before untouched.
    """
    root = out / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / folder_name(step)
    partial = root / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weights = net.state_dict()
    write_state_dict(partial / "model.safetensors", weights, net.config)
    for name, average in zip(_average_names(), averages, strict=False):
        write_state_dict(partial / name, weights | dict(average), net.config)
    write_state_dict(partial / "optimizer.safetensors", _optimizer_tensors(net, optimizer))
    (partial / "generate.json").write_text(json.dumps(generate, indent=1))
    (partial / "state.json").write_text(json.dumps({"version": VERSION, "step": step, **state}, indent=1))
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if final.exists():  # of a run that went back to an older checkpoint because this one could not be read
        shutil.rmtree(final)
    partial.rename(final)
    _sync(root)
    for old in checkpoint_folders(out)[keep:]:
        # renamed first, so that a kill leaves no half folder under a checkpoint's name
        shutil.rmtree(old.rename(old.with_name(f"{old.name}.partial")))
    return final


def load_latest(out: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that can be read; `tell` hears of those that cannot. None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    folders = checkpoint_folders(out)
    for folder in folders:
        try:
            return _load(folder)
        except (CheckpointError, OSError, ValueError, KeyError) as error:
            tell(f"checkpoint {folder} cannot be read and is passed over: {error}")
    if folders:
        raise CheckpointError(f"none of the {len(folders)} checkpoints in {out} can be read: give another out folder")
    return None


def _load(folder: Path) -> Checkpoint:
    state = json.loads((folder / "state.json").read_text())
    if state["version"] != VERSION:
        raise CheckpointError(f"state.json is of version {state['version']}, this trainer reads {VERSION}")
    averages = itertools.takewhile(Path.exists, (folder / name for name in _average_names()))
    return Checkpoint(
        folder,
        state,
        read_state_dict(folder / "model.safetensors"),
        [read_state_dict(path) for path in averages],
        read_state_dict(folder / "optimizer.safetensors"),
    )


def _average_names() -> Iterator[str]:
    """Of the files of moving averages, without end."""
    yield "ema.safetensors"
    yield from (f"ema-{number}.safetensors" for number in itertools.count(2))


def _optimizer_tensors(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in net.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(net: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put a saved state into the optimizer of `net`."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {names[parameter]: i for i, parameter in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        state.setdefault(number[name], {})[kind] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
