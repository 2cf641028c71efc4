"""Small files that ask for much: each is refused in one message, quickly, and without the memory that it asks for."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from microdit.model.checkpoint import CheckpointError, load_model, read_config
from microdit.model.loading import find_parts
from microdit.model.network import MicroDiT
from microdit.model.network_config import check_network_config
from microdit.model.strict_json import parse_json

SMALL: dict[str, Any] = {
    "input_size": 8, "dim": 32, "depth": 2, "head_dim": 8, "multiple_of": 16, "caption_channels": 12,
    "patch_mixer_depth": 1, "patch_mixer_dim": 24, "num_experts": 2,
}  # fmt: skip
BRACKETS = "[" * 100_000


pytestmark = pytest.mark.usefixtures("bounded")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return MicroDiT(**SMALL).state_dict()


CONFIGS: list[dict[str, Any]] = [
    {"depth": 10**9}, {"patch_mixer_depth": 10**9}, {"input_size": 10**6}, {"input_size": 8192, "patch_size": 1},
    {"dim": 10**12}, {"dim": -4}, {"head_dim": 0}, {"patch_size": 0}, {"multiple_of": 0}, {"num_experts": 10**9},
    {"in_channels": 10**12}, {"caption_channels": 10**15}, {"patch_mixer_dim": 2**62}, {"depth": "many"},
    {"depth": True}, {"norm_eps": float("nan")}, {"expert_capacity": float("inf")}, {"qkv_multipliers": [1.0] * 10**6},
    {"qkv_multipliers": [BRACKETS]}, {"ffn_multipliers": [1e300]}, {"ffn_multipliers": {}}, {"use_bias": 3},
    {"experts_every_n": -1}, {"unheard_of": 1}, {"x" * 10**6: 1}, {"pos_interp_scale": [1]}, {"caption_channels": 24},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config}"[:40])
@pytest.mark.parametrize("empty", [False, True])
def test_a_config_beyond_bounds(
    config: dict[str, Any], empty: bool, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "net.safetensors"
    tensors = {} if empty else {name: value.contiguous() for name, value in weights.items()}
    save_file(tensors, path, {"config": json.dumps(SMALL | config)})
    with pytest.raises(CheckpointError) as raised:
        load_model(path)
    assert len(str(raised.value)) < 4000


@pytest.mark.parametrize("text", [BRACKETS, '{"dim":' * 50_000, "9" * 100_000, "[1]", '"x"', "{"])
def test_a_config_that_is_no_object(text: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({}, path, {"config": text})
    with pytest.raises(CheckpointError, match="the config in its header is no JSON object"):
        read_config(path)


@pytest.mark.parametrize("length", [2**63, 2**62, 2**40, 10**9, 100])
def test_a_header_of_absurd_length(length: int, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}')
    with pytest.raises(CheckpointError, match="is the file whole"):
        load_model(path)


def test_shapes_of_no_numbers(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Shapes with a zero take no bytes in a file, and may have any other axes."""
    path = tmp_path / "net.safetensors"
    for name, shape in [
        ("blocks.0.mlp.w1.weight", (10**12, 0)),
        ("y_emb_preprocess.mlp.w1.weight", (10**12, 0)),
        ("pos_embed", (1, 10**14, 0)),
        ("x_embedder.proj.weight", (0, 10**9, 10**9, 0)),
        ("x_embedder.proj.weight", (10**12, 0, 10**5, 1)),
        ("patch_mixer.0.norm1.weight", (0,)),
        ("blocks.1.attn.qkv.weight", (10**15, 0)),
        ("y_embedder.y_proj.fc1.weight", (0, 10**15)),
    ]:
        save_file({key: v.contiguous() for key, v in weights.items()} | {name: torch.empty(shape)}, path)
        with pytest.raises(CheckpointError):
            load_model(path, head_dim=8)


def test_more_blocks_than_a_network_has(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    more = {
        f"blocks.{number}.{key.split('.', 2)[2]}": value.clone()
        for key, value in weights.items()
        if key.startswith("blocks.0.attn.qkv")
        for number in range(2, 3000)
    }
    save_file({key: v.contiguous() for key, v in weights.items()} | more, path)
    with pytest.raises(CheckpointError):
        load_model(path, head_dim=8)


TORCH: dict[str, Callable[[], Any]] = {
    "repeated numbers": lambda: {"x": torch.zeros(1).expand(10**12)},
    "sparse": lambda: {"x": torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0), (10**12,))},
    "no numbers": lambda: {"x": torch.empty(10**12, device="meta")},
    "a list": lambda: [torch.zeros(1)],
    "nested": lambda: {"x": {"x": torch.zeros(1)}},
    "a number": lambda: {"x": 10**1000},
    "names": lambda: {(1, 2): torch.zeros(1), "x" * 10**6: torch.zeros(1)},
}


@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(kind: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(TORCH[kind](), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as raised:
        load_model(path)
    assert len(str(raised.value)) < 1000


def test_pickles_within_files_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    code = pickle.dumps(print)
    for data, compression in ((deep, 0), (code, 0), (b"\x80\x02" + bytes(1 << 26), zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("archive/data.pkl", data)
            file.writestr("archive/version", b"3\n")
        with pytest.raises(CheckpointError) as raised:
            load_model(path)
        assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"latent_shape": [4, 10**9, 10**9]}, {"latent_shape": [4, 0, 8]}, {"latent_shape": [4, "x", 8]},
        {"latent_shape": 5}, {"latent_shape": [4, float("inf"), 8]}, {"latents": 3},
        {"latents": {"autoencoder": "x", "model": "y"}},
        {"text": {"encoder": "x", "model": {"max_tokens": 10**12}}}, {"text": {"encoder": "x", "model": {"dtype": []}}},
        {"sigma_data": "much"}, {"sigma_min": 0}, {"sigma_min": float("nan")}, {"sigma_min": 1e9},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_run_says_beyond_bounds(change: dict[str, Any], tmp_path: Path) -> None:
    info = {"latent_shape": [4, 8, 8], "latents": {"autoencoder": "demo"}, "text": {"encoder": "demo"}}
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "generate.json").write_text(json.dumps(info | change))
    with pytest.raises(CheckpointError, match=r"generate\.json is damaged"):
        find_parts(tmp_path)
    (tmp_path / "generate.json").write_text(BRACKETS)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        find_parts(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(SMALL)), JSON, min_size=1, max_size=3))
def test_any_config_is_a_network_or_a_message(change: dict[str, Any]) -> None:
    try:
        check_network_config(SMALL | change)
    except ValueError:
        return
    assert all(isinstance(value, int) for value in change.values())


def test_depth_is_no_crash() -> None:
    for text in (BRACKETS, BRACKETS.encode(), '{"a":' * 99_999):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    assert parse_json(io.BytesIO(b"[[1]]").read()) == [[1]]
