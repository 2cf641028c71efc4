"""Reads a set of open_clip's outputs: `tokens.json`, `text_tower_spec.json` and `text_tower.npz` in a folder.

The weights of its text tower are made from their names, so that nothing large is stored.
"""

import json
import lzma
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).parents[2] / "data"


def read_tokens(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokens.json").read_text(encoding="utf-8"))


def read_tower(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The spec of the tower, and the arrays that open_clip gave."""
    spec = json.loads((folder / "text_tower_spec.json").read_text(encoding="utf-8"))
    with np.load(folder / "text_tower.npz", allow_pickle=False) as arrays:
        return spec, dict(arrays)


def weights(spec: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of open_clip's CLIP class, checked against the sums in the spec."""
    found = {}
    for entry in spec["keys"]:
        key, shape = entry["key"], entry["shape"]
        generator = np.random.Generator(np.random.PCG64(zlib.crc32((spec["weights"]["seed_prefix"] + key).encode())))
        z = generator.standard_normal(shape, dtype=np.float32)
        if entry["rule"] == "fan_in":
            value = z * np.float32(1 / np.sqrt(shape[1]))
        elif entry["rule"] == "bias":
            value = z * np.float32(0.2)
        elif entry["rule"] == "norm_weight":
            value = np.float32(1) + np.float32(0.1) * z
        else:
            raise ValueError(f"{key}: unknown rule {entry['rule']!r}")
        assert zlib.crc32(np.ascontiguousarray(value, "<f4").tobytes()) == entry["crc32"], f"{key} was made otherwise"
        found[key] = torch.from_numpy(value)
    return found


def write_merges(folder: Path) -> None:
    """`merges.txt` of CLIP's tokenizer, as a hub repository has it."""
    with lzma.open(DATA / "clip_merges" / "merges.txt.xz") as stream:
        (folder / "merges.txt").write_bytes(stream.read())


def write_model(folder: Path, spec: dict[str, Any]) -> str:
    """The tower as a repository of open_clip's: its config, its weights, and the tokenizer."""
    folder.mkdir()
    model = {name: spec["build"][name] for name in ("embed_dim", "quick_gelu", "text_cfg")}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    torch.save(weights(spec), folder / "open_clip_pytorch_model.bin")
    write_merges(folder)
    return str(folder)
