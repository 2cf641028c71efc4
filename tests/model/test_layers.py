"""Experts and attention against plain forms of the same mathematics."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import experts
from benchmarks.experts import one_hot_experts
from microdit.model import layers
from microdit.model.layers import Experts, attention


def _experts(dim: int, num_experts: int, capacity: float, dtype: torch.dtype = torch.float64) -> Experts:
    layer = Experts(dim, hidden=2 * dim, multiple_of=1, num_experts=num_experts, capacity=capacity).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4), tokens=st.integers(1, 20), num_experts=st.integers(1, 6),
    capacity=st.sampled_from([0.5, 1.0, 1.5, 2.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_experts_and_gradients_equal_the_one_hot_form(
    batch: int, tokens: int, num_experts: int, capacity: float, seed: int
) -> None:
    if capacity > num_experts:
        capacity = float(num_experts)
    torch.manual_seed(seed)
    layer = _experts(6, num_experts, capacity)
    x = torch.randn(batch, tokens, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(batch, tokens, 6, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    ours, plain = layer(x), one_hot_experts(layer, x)
    torch.testing.assert_close(ours, plain)
    for got, expected in zip(
        torch.autograd.grad((ours * weights).sum(), inputs, allow_unused=True),
        torch.autograd.grad((plain * weights).sum(), inputs, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_experts_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    layer = _experts(3, 2, 1.0)
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *values))


def test_experts_with_fewer_tokens_than_places() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert not _experts(6, 8, 2.0)(x).any()  # int(2 * 3 / 8) = 0 tokens each
    assert _experts(6, 2, 9.0)(x).shape == x.shape  # at most all tokens


def test_a_token_that_no_expert_takes_gets_zero() -> None:
    layer = _experts(6, 1, 0.5)
    x = torch.randn(1, 10, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.gate.weight.zero_()
    assert (layer(x).abs().sum(-1) == 0).sum() == 5


def test_experts_in_bfloat16() -> None:
    torch.manual_seed(0)
    layer = _experts(16, 4, 4.0, torch.float32)  # each expert takes all tokens: routing cannot differ
    x = torch.randn(2, 8, 16)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    pure = layer.bfloat16()(x.bfloat16())
    for out in (mixed, pure):
        assert out.dtype == torch.bfloat16
        assert (out - exact).norm() < 0.02 * exact.norm()


@settings(max_examples=30, deadline=None)
@given(queries=st.integers(1, 9), keys=st.integers(1, 9), masked=st.booleans(), seed=st.integers(0, 99))
def test_plain_attention_equals_the_fused_kernel(queries: int, keys: int, masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    q = torch.randn(2, queries, 12, requires_grad=True)
    k, v = torch.randn(2, keys, 12, requires_grad=True), torch.randn(2, keys, 12, requires_grad=True)
    mask = torch.rand(2, keys) < 0.5
    mask[:, 0] = True
    key_mask = mask if masked else None
    weights = torch.randn(2, queries, 12)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for limit in (0, 128):
            patch.setattr(layers, "PLAIN_ATTENTION_KEYS", limit)
            out = attention(q, k, v, heads=3, eps=1e-6, key_mask=key_mask)
            results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, atol=2e-6, rtol=1e-5)


def test_masked_keys_have_no_influence() -> None:
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    mask = torch.arange(7)[None] < torch.tensor([[3], [7]])
    out = attention(q, k, v, 2, 1e-6, mask)
    torch.testing.assert_close(out[:1], attention(q[:1], k[:1, :3], v[:1, :3], 2, 1e-6))
    k[0, 3:], v[0, 3:] = 1e4, -1e4
    torch.testing.assert_close(attention(q, k, v, 2, 1e-6, mask), out)


def test_benchmark_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--widths", "tiny", "--tokens", "64", "256", "--batch-tokens", "256", "--repeat", "1"]
    assert experts.main(["--json", *sizes]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed)["rows"]
    assert printed.count("\n") == 1
    assert [(row["tokens"], row["batch"]) for row in rows] == [(64, 4), (256, 1)]
    assert all(row["gather"]["peak_mib"] > 0 and row["gather"]["seconds"] > 0 for row in rows)
    assert rows[1]["memory_ratio"] > 1  # one-hot matrices cost memory
