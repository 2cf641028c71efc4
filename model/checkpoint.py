"""Weights of MicroDiT in files: `.pt` (a torch state dict, as released) and `.safetensors`, read, written, converted.

`python -m microdit.model.checkpoint SOURCE TARGET` converts one into the other. Nothing is ever unpickled but tensors.
"""

import json
import math
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from microdit.model.network import PRESETS, MicroDiT
from microdit.model.network_config import WIDTH, check_network_config
from microdit.model.pretrained.hub import reason
from microdit.model.strict_json import parse_json

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
LISTED = 20  # entries of each kind that an error names


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the network. The message says which file and what to do."""


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: unknown checkpoint format {path.suffix!r}, expected {', '.join(SUFFIXES)}")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file, by name, on the CPU (mapped from the file where the format allows)."""
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        if is_zip := _is_zip(path):
            _check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); is the file whole?") from error
    except Exception as error:  # torch.load raises many kinds on bytes that are no checkpoint
        raise CheckpointError(
            f"{path}: cannot be read as a state dict of tensors ({reason(error)}); "
            "is the file whole, and does it hold nothing but tensors?"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        kind = type(state).__name__
        if isinstance(state, Mapping):
            some = [key[:80] if isinstance(key, str) else type(key).__name__ for key in [*state][:5]]
            kind = f"entries {', '.join(some)}"
        raise CheckpointError(f"{path}: expected a state dict (names to tensors), found {kind}")
    for key, value in state.items():
        _check_stored(path, key, value)
    return dict(state)


def _check_stored(path: Path, key: str, value: Tensor) -> None:
    """Refuse a tensor that is more than the numbers that the file holds: copied, it would take any memory.

    Raises:
        CheckpointError: it is sparse, quantized or without numbers, or repeats some of them.
    """
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {key[:80]} has shape {tuple(value.shape)}, and the file does not hold all of its numbers; "
            "save it dense and contiguous"
        )


def _is_zip(path: Path) -> bool:
    """Recognise a zip: files of torch before 1.6 are none, and cannot be mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _check_zip(path: Path) -> None:
    """Refuse a zip whose members are larger than they lie in the file: torch writes them as they are.

    Raises:
        CheckpointError: it has such a member.
        zipfile.BadZipFile: it cannot be read.
    """
    with zipfile.ZipFile(path) as file:
        if any(item.compress_type != zipfile.ZIP_STORED for item in file.infolist()):
            raise CheckpointError(f"{path}: its members are compressed, expected a file as torch.save writes it")


def read_config(path: str | Path) -> dict[str, Any] | None:
    """Read the `MicroDiT` arguments stored in a safetensors file; None if there are none (as in every `.pt`)."""
    if Path(path).suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("config")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); is the file whole?") from error
    try:
        config = None if stored is None else parse_json(stored)
    except ValueError:
        config = stored
    if config is not None and not isinstance(config, dict):
        raise CheckpointError(f"{path}: the config in its header is no JSON object: {str(stored)[:80]!r}")
    return config


def write_state_dict(path: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
    """Write tensors in the format of the suffix; the file appears whole or not at all.

    config: `MicroDiT` arguments, kept in the header of a safetensors file; a `.pt` cannot hold them.
    """
    path = Path(path)
    _check_suffix(path)
    partial = path.with_name(path.name + ".partial")
    seen: set[int] = set()
    tensors = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        # a view of a larger storage would be written with all of it, and a shared one is refused: copy these
        if value.untyped_storage().nbytes() != value.nbytes or value.data_ptr() in seen:
            value = value.clone()
        seen.add(value.data_ptr())
        tensors[key] = value
    if path.suffix == ".safetensors":
        save_file(tensors, partial, {"format": "pt"} | ({} if config is None else {"config": json.dumps(dict(config))}))
    else:
        torch.save(tensors, partial)
    partial.replace(path)


def convert(source: str | Path, target: str | Path) -> None:
    """Write the tensors of `source` to `target` in the format of its suffix, values and dtypes unchanged."""
    write_state_dict(target, read_state_dict(source), read_config(source))


def load_weights(net: MicroDiT, state: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Copy a state dict into `net`, in the dtype and on the device of `net`; every entry must fit.

    The position table is computed, never loaded, so a checkpoint of 256 px goes into a 512 px model. Its values are
    checked where the sizes agree. Raises CheckpointError with all missing, unexpected and mis-shaped entries.
    """
    check_entries(net, state, source)
    own = net.state_dict()
    stored = state["pos_embed"]
    # 0.02: above what storage in bfloat16 rounds, far below what another scale moves
    if stored.shape == own["pos_embed"].shape and not torch.allclose(
        stored.float().cpu(), own["pos_embed"].float().cpu(), atol=0.02
    ):
        scale = _position_scale(stored)
        raise CheckpointError(
            f"{source} was made with pos_interp_scale={scale:g}, the model has {net.pos_interp_scale:g}: "
            "build the model with the former"
        )
    net.load_state_dict({**state, "pos_embed": own["pos_embed"]}, strict=True)


def check_entries(net: MicroDiT, state: Mapping[str, Tensor], source: str) -> None:
    """Check names and shapes, without reading a number.

    Raises:
        CheckpointError: some are missing, unexpected, or of another shape.
    """
    own = net.state_dict()
    wrong = [
        f"{key}: {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape and key != "pos_embed"
    ]
    findings = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": wrong,
    }
    if any(findings.values()):
        raise CheckpointError(
            f"{source} does not fit the model:" + "".join(_listing(k, v) for k, v in findings.items())
        )


def _listing(kind: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = f"\n    ... and {len(entries) - LISTED} more" if len(entries) > LISTED else ""
    return f"\n  {len(entries)} {kind}:" + "".join(f"\n    {entry}" for entry in entries[:LISTED]) + more


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **config: Any
) -> MicroDiT:
    """Load the network of a checkpoint file, in eval mode.

    Its arguments are those stored in the file, or inferred from the shapes; `config` overrides them
    (`input_size=64, pos_interp_scale=2.0` loads a 256 px checkpoint for 512 px).
    """
    state = read_state_dict(path)
    stored = read_config(path)
    arguments = config_from_state_dict(state, **config) if stored is None else stored | config
    for name, part in (("depth", "blocks."), ("patch_mixer_depth", "patch_mixer.")):
        count = _count(state, part)
        if count and arguments.get(name, count) != count:
            raise CheckpointError(f"{path}: config says {name}={arguments[name]}, the file has {count} {part}*")
    try:
        net = on_meta(arguments)
    except ValueError as error:
        raise CheckpointError(f"{path}: no model can be built from its config: {error}") from error
    check_entries(net, state, str(path))  # before memory is taken for them
    net = net.to(dtype).to_empty(device=device)
    net.reset_positions()
    load_weights(net, state, str(path))
    return net.eval()


def on_meta(arguments: Mapping[str, Any]) -> MicroDiT:
    """Build a network without memory for its weights.

    Raises:
        ValueError: the arguments are none that a network can have, or beyond all bounds.
    """
    check_network_config(arguments)
    try:
        with torch.device("meta"):
            return MicroDiT(**arguments)
    except (TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(reason(error)) from error


def _count(state: Mapping[str, Tensor], part: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(part)})


def config_from_state_dict(state: Mapping[str, Tensor], **known: Any) -> dict[str, Any]:
    """Infer arguments of `MicroDiT` that give a network of these shapes.

    Not visible in shapes: head_dim (taken from the preset of the same dim and depth; otherwise it must be given),
    expert_capacity, norm_eps and depth_init (defaults). `known` arguments are taken as they are.
    """
    try:
        config = _shapes(state)
    except KeyError as error:
        raise CheckpointError(f"this is no MicroDiT state dict: it has no entry {error}") from error
    except (ValueError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"this is no MicroDiT state dict: an entry has axes of no network ({error})") from error
    preset = next((p for p in PRESETS.values() if all(config[k] == p[k] for k in ("dim", "depth"))), {})
    # A preset has ratios that rise with depth, where shapes tell no more than what they were rounded to. If it does not
    # fit, what the shapes tell comes first.
    seen_only = {k: v for k, v in config.items() if not k.startswith(("qkv_", "ffn_", "patch_mixer_", "multiple_of"))}
    for arguments in (seen_only | preset | known, preset | config | known):
        if "head_dim" not in arguments:
            raise CheckpointError(
                f"head_dim cannot be inferred from the shapes of a model of dim {config['dim']} and depth "
                f"{config['depth']}: give it (head_dim=...)"
            )
        try:
            net = on_meta(arguments)
        except ValueError as error:
            raise CheckpointError(f"no MicroDiT has entries of these shapes: {error}") from error
        shapes = {key: value.shape for key, value in net.state_dict().items() if key != "pos_embed"}
        if shapes == {key: value.shape for key, value in state.items() if key != "pos_embed"}:
            return net.config
    raise CheckpointError("no MicroDiT has exactly these entries and shapes: give the arguments that it was built with")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer arguments from shapes. Raises KeyError if an entry is missing that every MicroDiT has."""
    dim, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    depth, mixer_depth = _count(state, "blocks."), _count(state, "patch_mixer.")
    config: dict[str, Any] = {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "dim": dim,
        "depth": depth,
        "caption_channels": state["y_embedder.y_proj.fc1.weight"].shape[1],
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "pos_interp_scale": _position_scale(state["pos_embed"]),
        "use_bias": "y_emb_preprocess.attn.qkv.bias" in state,
        "use_patch_mixer": mixer_depth > 0,
        "qkv_multipliers": [state[f"blocks.{i}.attn.qkv.weight"].shape[0] / 3 / dim for i in range(depth)],
        "ffn_multipliers": [_ffn_ratio(state, f"blocks.{i}.", dim) for i in range(depth)],
        "experts_every_n": 0,
    }
    hidden = [value.shape[0] for key, value in state.items() if key.endswith("mlp.w1.weight")]
    for key, value in state.items():
        if key.endswith("mlp.w1"):
            hidden.append(value.shape[2])
            config["num_experts"] = value.shape[0]
            every = int(key.split(".")[1]) + 1
            config["experts_every_n"] = min(config["experts_every_n"] or every, every)
    caption_hidden = state["y_emb_preprocess.mlp.w1.weight"].shape[0]
    common = math.gcd(*hidden)
    if not 0 < common <= WIDTH:
        raise ValueError(f"feed-forward widths of {common}")
    config["multiple_of"] = next(
        (m for m in range(common, 0, -1) if common % m == 0 and -(-int(8 * dim / 3) // m) * m == caption_hidden), common
    )
    if mixer_depth:
        mixer_dim = state["patch_mixer.0.norm1.weight"].shape[0]
        config |= {
            "patch_mixer_depth": mixer_depth,
            "patch_mixer_dim": mixer_dim,
            "patch_mixer_qkv_ratio": state["patch_mixer.0.attn.qkv.weight"].shape[0] / 3 / mixer_dim,
            "patch_mixer_mlp_ratio": min(_ffn_ratio(state, f"patch_mixer.{i}.", mixer_dim) for i in range(mixer_depth)),
        }
    return config


def _ffn_ratio(state: Mapping[str, Tensor], block: str, dim: int) -> float:
    """Compute the largest ratio that gives a feed-forward of this width (ratios are rounded down, widths up)."""
    experts = state.get(block + "mlp.w1")
    if experts is not None:
        return (experts.shape[2] + 0.5) / dim
    return (math.ceil(1.5 * (state[block + "mlp.w1.weight"].shape[0] + 1)) - 0.5) / dim


def _position_scale(table: Tensor) -> float:
    """Infer pos_interp_scale of a table (1, T, D): in its second row, features 0 and D/4 are sin, cos of 1/scale."""
    if table.shape[1] < 2:
        return 1.0
    angle = math.atan2(table[0, 1, 0], table[0, 1, table.shape[2] // 4])
    return float(f"{1 / angle:.3g}") if angle > 0 else 1.0


def _main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(
            "usage: python -m microdit.model.checkpoint SOURCE TARGET   (.pt or .safetensors, either way)",
            file=sys.stderr,
        )
        return 2
    try:
        convert(*arguments)
    except CheckpointError as error:
        words = str(error)  # among them names of a stranger's file
        print("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in words), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
