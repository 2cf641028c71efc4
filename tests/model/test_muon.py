"""Muon against singular values, against torch's own, and where nothing may change."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from microdit.model.muon import Muon, has_matrices, orthogonal
from tests.model.test_network import build


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 24), st.integers(2, 24), st.integers(0, 2**32))
def test_singular_values_come_near_one_and_experts_are_made_alone(e: int, n: int, m: int, seed: int) -> None:
    matrices = torch.randn(e, n, m, generator=torch.Generator().manual_seed(seed))
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    strong = torch.linalg.svdvals(matrices) > 0.05 * matrices.norm(dim=(1, 2))[:, None]
    assert values.max() < 1.3 and values[strong].min() > 0.5
    torch.testing.assert_close(found, torch.stack([orthogonal(one) for one in matrices]), rtol=1e-3, atol=1e-3)


def test_steps_are_those_of_torchs_muon() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(24, 16)) for _ in range(2))
    theirs.data.copy_(ours.data)
    a = Muon([{"params": [ours], "muon": True}], lr=0.01, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(24, 16)
        before = ours.detach().clone()
        a.step()
        b.step()
        assert (ours - before).norm() > 10 * (ours - theirs).norm()  # torch's own is rounded to bfloat16


def test_others_are_stepped_by_adamw_and_a_bad_gradient_changes_nothing() -> None:
    torch.manual_seed(0)
    weights: list[Tensor] = [torch.randn(2, 4, 6), torch.randn(5)]
    ours = [nn.Parameter(one.clone()) for one in weights]
    adam = nn.Parameter(weights[1].clone())
    a = Muon([{"params": ours[:1], "muon": True}, {"params": ours[1:]}], lr=0.01, fused=True)
    b = torch.optim.AdamW([adam], lr=0.01, fused=True)
    for bad in (0.0, 1.0, 0.0):
        gradients = [torch.randn_like(one) for one in weights]
        before = [one.detach().clone() for one in ours]
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient * (torch.nan if bad else 1)
        a.found_inf = torch.tensor(bad)
        a.step()
        if not bad:
            adam.grad = gradients[1]
            b.step()
        changed = [not torch.equal(x, y) for x, y in zip(before, ours, strict=True)]
        assert changed == [not bad] * 2
        torch.testing.assert_close(ours[1], adam, rtol=0, atol=0)
    assert (
        len(a.param_groups) == 2
        and set(a.state[ours[0]]) == {"step", "momentum_buffer"}
        and a.state[ours[0]]["step"] == 2
    )


def test_the_matrices_of_blocks_are_taken() -> None:
    net = build(num_experts=2, experts_every_n=2)
    taken = {name for name, parameter in net.named_parameters() if has_matrices(name, parameter)}
    assert {
        "blocks.0.attn.qkv.weight",
        "y_emb_preprocess.mlp.w1.weight",
        "patch_mixer.0.cross_attn.proj.weight",
    } <= taken
    assert any(name.endswith("mlp.w1") for name in taken)  # of experts
    for name in ("x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.norm1.weight"):
        assert name not in taken
    assert not any("adaLN" in name or "gate" in name for name in taken)
