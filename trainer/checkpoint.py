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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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


@dataclass(frozen=True)
class Snapshot:
    """The tensors of a checkpoint's files by file name, in the memory of the machine, and the network's arguments."""

    files: dict[str, dict[str, Tensor]]
    config: dict[str, Any]


def snapshot(net: MicroDiT, averages: Sequence[Mapping[str, Tensor]], optimizer: torch.optim.Optimizer) -> Snapshot:
    """A copy of what a run has learned, which further steps do not change. averages: parameters by name."""

    def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

    weights = copied(net.state_dict())
    files = {"model.safetensors": weights}
    for name, average in zip(_average_names(), averages, strict=False):
        files[name] = weights | copied(average)
    return Snapshot(files | {"optimizer.safetensors": copied(_optimizer_tensors(net, optimizer))}, net.config)


def write(
    out: Path, step: int, tensors: Snapshot, state: Mapping[str, Any], generate: Mapping[str, Any], keep: int
) -> Path:
    """Write the checkpoint of a step, durable when this returns, and drop all but the last `keep`.

    Returns the folder. A kill at any moment leaves the checkpoints before untouched, and so does a full disk.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    root = out / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / folder_name(step)
    partial = root / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, found in tensors.files.items():
            write_state_dict(partial / name, found, None if name == "optimizer.safetensors" else tensors.config)
        (partial / "generate.json").write_text(json.dumps(generate, indent=1))
        (partial / "state.json").write_text(json.dumps({"version": VERSION, "step": step, **state}, indent=1))
        for path in (*partial.iterdir(), partial):
            _sync(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
    if final.exists():  # of a run that went back to an older checkpoint because this one could not be read
        shutil.rmtree(final)
    partial.rename(final)
    _sync(root)
    for old in checkpoint_folders(out)[keep:]:
        # renamed first, so that a kill leaves no half folder under a checkpoint's name
        shutil.rmtree(old.rename(old.with_name(f"{old.name}.partial")))
    return final


class Saver:
    """Writes checkpoints in a thread, one after the other, while the run goes on.

    One that cannot be written (a full disk) is told to `tell`, and the run goes on: the last good one stays. At the end
    there is nobody to go on: `finish` raises.
    """

    def __init__(self, out: Path, keep: int, tell: Callable[[str], None]):
        self.out, self.keep, self.tell = out, keep, tell
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._step = 0

    def save(
        self,
        step: int,
        net: MicroDiT,
        averages: Sequence[Mapping[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        generate: Mapping[str, Any],
    ) -> None:
        """Copy it all, and begin to write; waits for the one before."""
        try:
            self.finish()
        except CheckpointError as error:
            self.tell(f"{error}; the run goes on, and the checkpoint before it stays")
        self._step = step
        tensors = snapshot(net, averages, optimizer)
        self._writing = self._pool.submit(write, self.out, step, tensors, state, generate, self.keep)

    def finish(self) -> None:
        """Wait until what was begun is written.

        Raises:
            CheckpointError: it cannot be written.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            raise CheckpointError(f"the checkpoint of step {self._step} cannot be written: {error}") from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()


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
