"""Checkpoint files: both formats, conversion, resolutions, configs told from shapes, and what a wrong file says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from microdit.model import checkpoint
from microdit.model.checkpoint import (
    CheckpointError,
    config_from_state_dict,
    convert,
    load_model,
    load_weights,
    read_config,
    read_state_dict,
    write_state_dict,
)
from microdit.model.network import MicroDiT
from tests.model.parity_format import ParitySet, constructor_config

SMALL = {
    "input_size": 8, "in_channels": 4, "dim": 32, "depth": 3, "head_dim": 8, "multiple_of": 16, "caption_channels": 12,
    "patch_mixer_depth": 2, "patch_mixer_dim": 24, "num_experts": 4,
}  # fmt: skip


@pytest.fixture
def small() -> MicroDiT:
    torch.manual_seed(0)
    return MicroDiT(**SMALL)


def _equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_round_trip(small: MicroDiT, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    write_state_dict(path, small.state_dict(), small.config)
    assert _equal(read_state_dict(path), small.state_dict())
    assert read_config(path) == (small.config if suffix == ".safetensors" else None)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = load_model(path, head_dim=8)
    assert _equal(loaded.state_dict(), small.state_dict())
    assert not loaded.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion_both_ways_keeps_every_bit(small: MicroDiT, tmp_path: Path, dtype: torch.dtype) -> None:
    state = small.to(dtype).state_dict()
    write_state_dict(tmp_path / "a.pt", state)
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.pt")
    assert _equal(read_state_dict(tmp_path / "b.safetensors"), state)
    assert _equal(read_state_dict(tmp_path / "c.pt"), state)
    assert load_model(tmp_path / "c.pt", head_dim=8).pos_embed.dtype == torch.float32


def test_conversion_from_the_command_line(small: MicroDiT, tmp_path: Path) -> None:
    write_state_dict(tmp_path / "a.safetensors", small.state_dict(), small.config)

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "microdit.model.checkpoint", *(str(tmp_path / name) for name in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    assert run("a.safetensors", "b.pt") == (0, "")
    assert _equal(read_state_dict(tmp_path / "b.pt"), small.state_dict())
    code, message = run("none.pt", "b.safetensors")
    assert code == 2 and "none.pt: no such file" in message
    assert not (tmp_path / "b.safetensors").exists()


def test_views_and_tied_tensors_are_written_alone(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    state = {"view": base[:3], "tied": base, "again": base, "turned": base.view(2, 500).T}
    for name in ("a.pt", "a.safetensors"):
        write_state_dict(tmp_path / name, state)
        assert _equal(read_state_dict(tmp_path / name), state)


def test_256_px_checkpoint_into_512_px_model(small: MicroDiT, tmp_path: Path) -> None:
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "net.pt"
    torch.save(small.state_dict(), path)
    large = load_model(path, head_dim=8, input_size=16, pos_interp_scale=2.0)
    fresh = MicroDiT(**SMALL | {"input_size": 16, "pos_interp_scale": 2.0})
    assert torch.equal(large.pos_embed, fresh.pos_embed)
    assert _equal(
        {k: v for k, v in large.state_dict().items() if k != "pos_embed"},
        {k: v for k, v in small.state_dict().items() if k != "pos_embed"},
    )
    # and the small model, run on the large grid, is the same function
    x, y = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 12)
    torch.testing.assert_close(large(x, torch.zeros(2), y)["sample"], small(x, torch.zeros(2), y)["sample"])


def test_error_lists_missing_unexpected_and_misshaped(small: MicroDiT) -> None:
    state = dict(small.state_dict())
    del state["blocks.1.norm1.weight"]
    state["blocks.9.extra"] = torch.zeros(1)
    state["final_layer.linear.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        load_weights(small, state, "net.pt")
    message = str(error.value)
    assert message.startswith("net.pt does not fit the model")
    assert "1 missing:\n    blocks.1.norm1.weight" in message
    assert "1 unexpected:\n    blocks.9.extra" in message
    assert "final_layer.linear.bias: (3,), expected (16,)" in message


def test_error_stays_short_when_everything_is_wrong(small: MicroDiT) -> None:
    with pytest.raises(CheckpointError, match=r"and \d+ more") as error:
        load_weights(small, {f"other.{i}": torch.zeros(1) for i in range(500)})
    assert len(str(error.value).splitlines()) < 60


def test_positions_of_another_scale_are_refused(small: MicroDiT) -> None:
    state = MicroDiT(**SMALL | {"pos_interp_scale": 2.0}).state_dict()
    with pytest.raises(CheckpointError, match="pos_interp_scale=2, the model has 1"):
        load_weights(small, state)


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name in ("evil", "text"):
        with pytest.raises(CheckpointError, match=rf"{name}\.pt: cannot be read as a state dict") as error:
            read_state_dict(tmp_path / f"{name}.pt")
        assert "weights_only" not in str(error.value)  # torch says how to unpickle it all the same
    assert "unpickled" not in capsys.readouterr().out


def test_names_of_a_file_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"\x1b[2J\x9b\u202ea": "no tensor"}, tmp_path / "\x1b]0;a.pt")
    assert checkpoint._main([str(tmp_path / "\x1b]0;a.pt"), str(tmp_path / "out.safetensors")]) == 2
    said = capsys.readouterr().err
    assert r"\x1b]0;a.pt" in said and not set("\x1b\x9b\u202e") & set(said)


@pytest.mark.parametrize("content", [{"step": 3}, [torch.zeros(1)], {"model": {"a": torch.zeros(1)}}])
def test_other_content_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors", "none.ckpt"])
def test_missing_file_and_unknown_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such file|unknown checkpoint format"):
        read_state_dict(tmp_path / name)


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 6000), flip=st.integers(0, 6000), suffix=st.sampled_from([".pt", ".safetensors"]))
def test_broken_bytes_give_one_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("broken") / f"a{suffix}"
    write_state_dict(path, {"a": torch.arange(1000.0), "b": torch.zeros(7)})
    data = bytearray(path.read_bytes()[:cut])
    if flip < len(data):
        data[flip] ^= 0xFF
    path.write_bytes(data)
    try:
        state = read_state_dict(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(v, torch.Tensor) for v in state.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depth": 10**9}, "config says depth=1000000000, the file has 3 blocks"),
        ({"colour": 3}, "no model can be built from its config"),
        ([1], "no JSON object"),
    ],
)
def test_wrong_config_in_a_header(small: MicroDiT, tmp_path: Path, config: object, message: str) -> None:
    save_file(dict(small.state_dict()), tmp_path / "a.safetensors", {"config": json.dumps(config)})
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a.safetensors")


def test_config_of_every_released_model_is_told_from_shapes() -> None:
    parity = ParitySet(Path(__file__).parents[1] / "data" / "parity")
    for name, entry in parity.manifest().items():
        with torch.device("meta"):
            net = MicroDiT(**constructor_config(entry["constructor"], {}))
        positions = net._pos_embed(net.grid_size, net.grid_size, torch.device("cpu"))
        state = net.state_dict() | {"pos_embed": positions}
        told = config_from_state_dict(state, **({"head_dim": 16} if name == "small_custom" else {}))
        with torch.device("meta"):
            rebuilt = MicroDiT(**told)
        assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in state.items()}, name
        if name != "small_custom":
            assert told == net.config, name


def test_config_without_head_dim_is_asked_for(small: MicroDiT) -> None:
    with pytest.raises(CheckpointError, match="give it"):
        config_from_state_dict(small.state_dict())
    with pytest.raises(CheckpointError, match="no entry 'x_embedder"):
        config_from_state_dict({"a": torch.zeros(1)})


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 4), depth=st.integers(1, 4), multiple_of=st.sampled_from([1, 3, 8, 16]),
    mixer=st.sampled_from([None, 8, 16, 24]), use_bias=st.booleans(), every=st.sampled_from([0, 2, 3]),
    scale=st.sampled_from([0.5, 1.0, 1.5, 2.0]), low=st.sampled_from([0.3, 0.5, 1.0]),
)  # fmt: skip
def test_config_told_from_shapes_rebuilds_them(
    heads: int, depth: int, multiple_of: int, mixer: int | None, use_bias: bool, every: int, scale: float, low: float
) -> None:
    net = MicroDiT(
        input_size=6, in_channels=3, dim=8 * heads, depth=depth, head_dim=8, multiple_of=multiple_of,
        caption_channels=5, pos_interp_scale=scale, qkv_multipliers=[low], ffn_multipliers=[3 * low],
        use_patch_mixer=mixer is not None, patch_mixer_depth=4, patch_mixer_dim=mixer or 8, use_bias=use_bias,
        patch_mixer_mlp_ratio=2.5, num_experts=2, experts_every_n=every,
    )  # fmt: skip
    state = net.state_dict()
    rebuilt = MicroDiT(**config_from_state_dict(state, head_dim=8))
    load_weights(rebuilt, state)
    assert _equal(rebuilt.state_dict(), state)
