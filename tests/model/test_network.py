"""The network: text masks, patch masks, other grids, precisions, compilation, initial weights, wrong input."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.model.network import PRESETS, MicroDiT, position_embedding

ROOT = Path(__file__).parents[2]

SMALL: dict[str, Any] = {
    "input_size": 8, "in_channels": 4, "dim": 32, "depth": 3, "head_dim": 8, "multiple_of": 16, "caption_channels": 12,
    "patch_mixer_depth": 2, "patch_mixer_dim": 24, "num_experts": 4,
}  # fmt: skip


def build(**config: Any) -> MicroDiT:
    """A small network with every weight alive (a fresh one gives zero).

    Tests that compare two ways to the same result take it in float64, so that rounding moves no token between experts.
    """
    torch.manual_seed(0)
    net = MicroDiT(**SMALL | config)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return net


def batch(size: int = 3, tokens: int = 6, height: int = 8, width: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(size, 4, height, width, generator=generator),
        torch.randn(size, generator=generator),
        torch.randn(size, tokens, 12, generator=generator),
    )


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=3, max_size=3))
def test_text_mask_equals_text_without_padding(lengths: list[int]) -> None:
    net = build().double()
    x, t, y = batch()
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    padded = net(x, t, torch.where(mask[..., None], y, 77.0), mask)["sample"]
    for b, length in enumerate(lengths):
        alone = net(x[b : b + 1], t[b : b + 1], y[b : b + 1, :length])["sample"]
        torch.testing.assert_close(padded[b : b + 1], alone, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_packed_captions_equal_padded_ones(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, on a CPU; padding and a caption that has no real token at all included."""
    net, (x, t, y) = build().double(), batch()
    mask = torch.arange(6) < torch.tensor([2, 6, 0])[:, None]
    order = torch.arange(net.grid_size**2).flip(0).expand(3, -1)

    def run() -> list[torch.Tensor]:
        out = net(x, t, y, mask, ratio, order)["sample"]
        return [out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))]

    positions = net._real_positions(mask)
    assert positions is not None and positions.tolist() == [0, 1, *range(6, 12)]
    packed = run()
    monkeypatch.setattr(net, "_real_positions", lambda mask: None)
    torch.testing.assert_close(packed, run(), atol=1e-10, rtol=1e-8)


def test_full_text_mask_is_no_mask() -> None:
    net = build().double()
    x, t, y = batch()
    full = net(x, t, y, torch.ones(3, 6, dtype=torch.bool))["sample"]
    torch.testing.assert_close(full, net(x, t, y)["sample"], atol=1e-5, rtol=1e-5)


def test_unconditional_is_the_same_for_any_length_and_mask() -> None:
    """Zero embeddings with no mask (as released), with a caption's mask (dropout), with a mask of no token at all."""
    net = build().double()
    x, t, _ = batch()
    released = net(x, t, torch.zeros(3, 77, 12))["sample"]
    for tokens in (1, 6):
        for mask in (torch.zeros(3, tokens), torch.arange(tokens)[None] < torch.tensor([[1], [1], [tokens]])):
            out = net(x, t, torch.zeros(3, tokens, 12), mask.bool())["sample"]
            torch.testing.assert_close(out, released, atol=2e-5, rtol=1e-5)


def test_no_real_token_is_finite_with_gradients() -> None:
    net = build().double()
    x, t, y = batch()
    out = net(x, t, y, torch.tensor([[False] * 6, [True] * 6, [True] + [False] * 5]))["sample"]
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    torch.testing.assert_close(out[:1], net(x[:1], t[:1], y[:1])["sample"], atol=1e-5, rtol=1e-5)


def test_captions_with_an_axis_of_one() -> None:
    net = build().double()
    x, t, y = batch()
    assert torch.equal(net(x, t, y)["sample"], net(x, t, y[:, None])["sample"])
    torch.testing.assert_close(net(x, t[:1], y)["sample"], net(x, t[:1].expand(3), y)["sample"])


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.5, 8), (0.3, 11)])
def test_masking(ratio: float, kept: int) -> None:
    net = build()
    x, t, y = batch()
    out = net(x, t, y, mask_ratio=ratio)
    assert out["mask"].shape == (3, 16)
    assert (out["mask"].sum(1) == 16 - kept).all()
    removed = out["mask"].view(3, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3).bool()
    assert not out["sample"][removed.expand_as(x)].any()
    assert (out["sample"][~removed.expand_as(x)] != 0).all()
    torch.manual_seed(5)
    first = net(x, t, y, mask_ratio=ratio)
    torch.manual_seed(5)
    assert torch.equal(net(x, t, y, mask_ratio=ratio)["sample"], first["sample"])
    assert not torch.equal(net(x, t, y, mask_ratio=ratio)["mask"], first["mask"])
    assert "mask" not in net(x, t, y)


def test_keeping_all_tokens_in_any_order_is_no_masking() -> None:
    net = build().double()
    x, t, y = batch()
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    out = net(x, t, y, mask_ratio=1e-18, permutation=order)
    torch.testing.assert_close(out["sample"], net(x, t, y)["sample"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(4, 16), (16, 4), (6, 10), (16, 16), (2, 2)])
def test_other_grids(height: int, width: int) -> None:
    net = build().double()
    x, t, y = batch(height=height, width=width)
    out = net(x, t, y, mask_ratio=0.5 if height * width > 8 else 0.0)
    assert out["sample"].shape == x.shape
    out["sample"].sum().backward()
    as_built = build(input_size=height, pos_interp_scale=height / 8).double() if height == width else None
    if as_built is not None:
        torch.testing.assert_close(net(x, t, y)["sample"], as_built(x, t, y)["sample"], atol=1e-5, rtol=1e-5)


def test_positions_of_a_wide_grid() -> None:
    """Row-major, first half the column, and a cut of the square table where the scale is the same."""
    square = position_embedding(16, 6, 6, 2.0).view(6, 6, 16)
    wide = position_embedding(16, 2, 5, 2.0).view(2, 5, 16)
    assert torch.equal(wide, square[:2, :5])
    assert torch.equal(square[..., :8], square[:1, :, :8].expand(6, 6, 8))
    assert torch.equal(square[..., 8:], square[:, :1, 8:].expand(6, 6, 8))
    assert torch.equal(square[..., :8].transpose(0, 1), square[..., 8:])


@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_bfloat16(precision: str) -> None:
    net = build(experts_every_n=0)  # routing may differ by rounding; the experts have a test of their own
    x, t, y = batch()
    exact = net(x, t, y)["sample"]
    if precision == "pure":
        net = net.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        out = net(x, t, y)["sample"]
    assert (out - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("precision", ["fp32", "autocast", "pure"])
@pytest.mark.parametrize("masked", [False, True])
def test_training_step_in_every_precision(precision: str, masked: bool) -> None:
    net = build()
    if precision == "pure":
        net = net.bfloat16()
    x, t, y = batch()
    text_mask = torch.arange(6)[None] < torch.tensor([[2], [6], [4]])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        out = net(x, t, y.half(), text_mask, mask_ratio=0.5 if masked else 0.0)
    out["sample"].float().square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("mask_ratio", "with_text_mask"), [(0.0, False), (0.75, True)])
def test_compiles_without_graph_breaks(mask_ratio: float, with_text_mask: bool) -> None:
    torch._dynamo.reset()
    net = build(depth=1).double()  # and two blocks of the mixer, of which the second has experts
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, t, y = batch()
    mask = torch.arange(6)[None] < torch.tensor([[2], [6], [4]]) if with_text_mask else None
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    results = []
    for call in (net, compiled):
        net.zero_grad()
        out = call(x, t, y, mask, mask_ratio, order)["sample"]
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in net.parameters())])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)


def test_compiles_on_another_grid_in_half_precision() -> None:
    torch._dynamo.reset()
    net = build(depth=1)
    x, t, y = batch(height=4, width=12)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(net, fullgraph=True, backend="eager")(x, t, y, mask_ratio=0.5)
    assert out["sample"].shape == x.shape and out["sample"].dtype == torch.bfloat16


def test_fresh_network_predicts_zero_and_starts_depth_scaled() -> None:
    torch.manual_seed(0)
    net = MicroDiT(**SMALL | {"dim": 128, "head_dim": 32, "patch_mixer_dim": 96, "depth": 4})
    assert not net(*batch())["sample"].any()
    for block in (*net.blocks, *net.patch_mixer):
        assert not block.adaLN_modulation[1].weight.any()
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for i, block in enumerate(net.blocks):
        assert block.attn.proj.weight.std().item() == pytest.approx(0.02 / (2 * (i + 1)) ** 0.5, rel=0.1)
    for block in net.patch_mixer:
        assert block.attn.proj.weight.std().item() == pytest.approx(0.02 / (2 * 4) ** 0.5, rel=0.1)
    assert not net.y_emb_preprocess.attn.proj.weight.any()
    assert not net.y_emb_preprocess.mlp.w3.weight.any()
    assert all(p.isfinite().all() for p in net.parameters())


def test_config_rebuilds_the_network() -> None:
    net = build(qkv_multipliers=[1.0], ffn_multipliers=(0.5, 1.0, 2.0))
    again = MicroDiT(**json.loads(json.dumps(net.config)))
    assert again.config == net.config
    again.load_state_dict(net.state_dict())
    x, t, y = batch()
    assert torch.equal(again(x, t, y)["sample"], net(x, t, y)["sample"])


def test_presets() -> None:
    with torch.device("meta"):
        xl, tiny = MicroDiT.xl_2(input_size=64, pos_interp_scale=2.0), MicroDiT.tiny_2(in_channels=16)
    assert sum(p.numel() for p in xl.parameters()) == 1_165_442_320
    assert xl.config["qkv_multipliers"][0] == 0.5 and xl.config["ffn_multipliers"][-1] == 4.0
    assert tiny.config["in_channels"] == 16 and tiny.config["dim"] == PRESETS["tiny_2"]["dim"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 36}, "dim=36 must be a multiple of head_dim=8"),
        ({"patch_mixer_dim": 20}, "patch_mixer_dim=20 must be a multiple"),
        ({"input_size": 7}, "input_size=7 is not a multiple of patch_size=2"),
        ({"qkv_multipliers": [0.5, 1.0]}, "qkv_multipliers has 2 values for 3 blocks"),
    ],
)
def test_wrong_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MicroDiT(**SMALL | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 3, 8, 8)}, r"x has shape \(3, 3, 8, 8\)"),
        ({"x": torch.zeros(3, 4, 8, 7)}, r"x has shape \(3, 4, 8, 7\)"),
        ({"t": torch.zeros(2)}, r"t has shape \(2,\)"),
        ({"y": torch.zeros(3, 6, 13)}, r"y has shape \(3, 6, 13\): expected \(3, L, 12\)"),
        ({"y": torch.zeros(2, 6, 12)}, r"y has shape \(2, 6, 12\)"),
        ({"text_mask": torch.ones(3, 5, dtype=torch.bool)}, r"expected bool \(3, 6\)"),
        ({"text_mask": torch.ones(3, 6)}, r"text_mask is torch.float32"),
        ({"mask_ratio": 1.0}, r"mask_ratio=1.0 keeps 0 of 16"),
        ({"mask_ratio": 0.5, "permutation": torch.zeros(3, 15, dtype=torch.int64)}, r"expected \(3, 16\)"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    x, t, y = batch()
    with pytest.raises(ValueError, match=message):
        build()(**{"x": x, "t": t, "y": y} | change)


def test_model_imports_neither_pipeline_nor_trainer() -> None:
    for path in (ROOT / "model").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("pipeline", "trainer", "ray", "obstore"), f"{path} imports {name}"


def test_runs_without_ray_and_obstore_and_builds_xl_at_once() -> None:
    code = """
import sys, time
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "obstore", "pipeline", "trainer"):
            raise ModuleNotFoundError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
import torch
from microdit.model.checkpoint import load_weights
from microdit.model.edm import EDM
from microdit.model.network import MicroDiT
net = MicroDiT(input_size=4, dim=16, depth=2, head_dim=8, caption_channels=4, patch_mixer_dim=8, multiple_of=8)
load_weights(net, net.state_dict())
assert EDM().sample(net, torch.randn(1, 4, 4, 4), torch.randn(1, 3, 4), num_inference_steps=2).isfinite().all()
start = time.process_time()
with torch.device("meta"):
    MicroDiT.xl_2(input_size=64, pos_interp_scale=2.0)
print(time.process_time() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2  # 0.1 s of the processor; 1.6 s with an operation that wakes torch's symbolic shapes
