"""EDM: preconditioning, loss, guidance, and samplers against a denoiser whose trajectories are known exactly."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import sampler as benchmark
from microdit.model.edm import EDM
from microdit.model.samplers import SAMPLERS
from tests.model.test_network import batch, build

MEAN, STD = 0.4, 0.9


class GaussianNet(nn.Module):
    """F such that D is exact for data N(MEAN + caption, STD^2); counts its calls and the rows it is given."""

    patch_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor, text_mask: Any = None, *_: Any) -> dict[str, Tensor]:
        self.calls.append(len(x))
        sigma = (4 * t.double()).exp().view(-1, 1, 1, 1)
        root = (sigma**2 + 0.81).sqrt()
        state, mean = x.double() * root, MEAN + y.double().mean((1, 2)).view(-1, 1, 1, 1)
        d = (STD**2 * state + sigma**2 * mean) / (STD**2 + sigma**2)
        return {"sample": (d - 0.81 / root**2 * state) * root / (sigma * 0.9)}


def exact(latents: Tensor, mean: float = MEAN) -> Tensor:
    """Where the probability-flow ODE takes latents * 80."""
    return mean + (latents.double() * 80 - mean) * STD / math.sqrt(STD**2 + 80**2)


def error(sampler: str, steps: int) -> float:
    latents, y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 1, 1)
    out = EDM().sample(GaussianNet(), latents, y, num_inference_steps=steps, guidance_scale=1.0, sampler=sampler)  # type: ignore[arg-type]
    return (out - exact(latents)).abs().max().item()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_reach_the_exact_solution_with_second_order(sampler: str) -> None:
    errors = [error(sampler, steps) for steps in (16, 32, 64)]
    assert errors[0] / errors[1] > 2.7
    assert errors[1] / errors[2] > 2.7
    assert errors[2] < 0.02


@pytest.mark.parametrize(("sampler", "calls"), [("heun", 19), ("dpmpp_2m", 10), ("unipc", 10)])
def test_network_calls_and_callback(sampler: str, calls: int) -> None:
    net, seen = GaussianNet(), []
    latents = torch.randn(2, 4, 8, 8)
    out = EDM().sample(
        net, latents, torch.zeros(2, 1, 1), num_inference_steps=10, guidance_scale=5.0, sampler=sampler,
        callback=lambda step, x: seen.append((step, x)),
    )  # fmt: skip
    assert net.calls == [4] * calls
    assert [step for step, _ in seen] == list(range(10))
    assert all(x.dtype == torch.float64 for _, x in seen)
    assert torch.equal(seen[-1][1].float(), out) and out.dtype == torch.float32


def test_fewer_calls_reach_the_same_picture() -> None:
    """Nearer to the exact end than heun at as many calls, and the corrector nearer still."""
    assert error("unipc", 20) < error("dpmpp_2m", 20) < error("heun", 11)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_lower_noise_than_told_is_asked_for(sampler: str) -> None:
    net, edm = GaussianNet(), EDM(sigma_min=1.5)
    asked: list[float] = []

    def watched(x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        asked.append(math.exp(4 * float(t[0])))
        return net(x, t, y, mask)

    latents = torch.randn(2, 4, 8, 8)
    edm.sample(watched, latents, torch.zeros(2, 1, 1), num_inference_steps=6, guidance_scale=1.0, sampler=sampler)  # type: ignore[arg-type]
    assert min(asked) == pytest.approx(1.5, rel=1e-5) and max(asked) == pytest.approx(80, rel=1e-5)
    assert edm.sigmas(6)[-2:].tolist() == pytest.approx([1.5, 0])
    for wrong in (0, -1, 80, math.nan):
        with pytest.raises(ValueError, match="sigma_min"):
            EDM(sigma_min=wrong)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_the_denoised_noise(sampler: str) -> None:
    latents = torch.randn(1, 4, 8, 8)
    edm, net, y = EDM(), GaussianNet(), torch.zeros(1, 1, 1)
    out = edm.sample(net, latents, y, num_inference_steps=1, guidance_scale=1.0, sampler=sampler)
    torch.testing.assert_close(out, edm.denoise(net, latents * 80, 80.0, y))


def test_guidance_moves_away_from_the_negative() -> None:
    edm, net = EDM(), GaussianNet()
    x, y = torch.zeros(2, 4, 8, 8), torch.full((2, 3, 1), 0.5)
    plain, zero = (edm.denoise(net, x, 3.0, z) for z in (y, torch.zeros_like(y)))
    torch.testing.assert_close(edm.denoise(net, x, 3.0, y, guidance_scale=4.0), zero + 4 * (plain - zero))
    negative = torch.full((1, 3, 1), -1.0)
    away = edm.denoise(net, x, 3.0, negative.expand(2, 3, 1))
    guided = edm.denoise(net, x, 3.0, y, guidance_scale=4.0, negative=negative)
    torch.testing.assert_close(guided, away + 4 * (plain - away))


def test_guidance_with_text_masks_and_sigma_per_sample() -> None:
    edm, net = EDM(), build().double()
    x, _, y = batch()
    mask = torch.arange(6)[None] < torch.tensor([[2], [6], [4]])
    other = torch.randn(3, 6, 12)
    other_mask = torch.arange(6)[None] < torch.tensor([[3], [1], [6]])
    sigma = torch.tensor([0.1, 1.0, 20.0])
    got = edm.denoise(net, x, sigma, y, mask, 3.0, negative=other, negative_mask=other_mask)
    c, u = edm.denoise(net, x, sigma, y, mask), edm.denoise(net, x, sigma, other, other_mask)
    torch.testing.assert_close(got, u + 3 * (c - u), atol=1e-4, rtol=1e-5)


def test_guidance_interval_and_scale_of_one() -> None:
    edm = EDM()
    latents, y = torch.randn(1, 4, 8, 8), torch.ones(1, 1, 1)
    sigmas = edm.sigmas(8).tolist()
    net = GaussianNet()
    edm.sample(
        net, latents, y, num_inference_steps=8, guidance_scale=5.0, sampler="dpmpp_2m",
        guidance_interval=(sigmas[5], sigmas[2]),
    )  # fmt: skip
    assert net.calls == [1, 1, 2, 2, 2, 1, 1, 1]
    for scale in (1.0, 0.5, 0.0):
        net = GaussianNet()
        edm.sample(net, latents, y, num_inference_steps=3, guidance_scale=scale)
        assert net.calls == [1] * 5


def test_sigmas() -> None:
    sigmas = EDM().sigmas(30)
    assert sigmas.shape == (31,) and sigmas.dtype == torch.float64
    assert sigmas[0].item() == pytest.approx(80) and sigmas[-2].item() == pytest.approx(0.002) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_denoiser_at_the_ends() -> None:
    """Nothing to do at small sigma: D is x; at large sigma x is ignored by c_skip."""
    x, _, y = batch()
    edm, net = EDM(), build()
    torch.testing.assert_close(edm.denoise(net, x, 1e-6, y), x, atol=1e-4, rtol=0)
    c_skip, c_out, c_in, c_noise = edm.preconditioning(torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(c_noise, torch.tensor([0.5, 2.0]).log() / 4)
    torch.testing.assert_close(c_skip, 0.81 * c_in**2)
    torch.testing.assert_close(c_out**2, 0.81 * (1 - c_skip))


def test_loss_of_a_perfect_and_of_an_idle_network() -> None:
    """With D exact for Gaussian data the loss is its posterior variance, weighted; c_skip x alone leaves weight one."""
    edm, generator = EDM(), torch.Generator().manual_seed(0)
    x0 = MEAN + STD * torch.randn(64, 4, 16, 16, generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    sigma = torch.full((64,), 0.7)
    loss = edm.loss(GaussianNet(), x0, torch.zeros(64, 1, 1), sigma=sigma, noise=noise)  # type: ignore[arg-type]
    weight = (0.49 + 0.81) / (0.7 * 0.9) ** 2
    assert loss.item() == pytest.approx(weight * (STD**2 * 0.49) / (STD**2 + 0.49), rel=0.02)


def test_loss_per_sample_and_mean() -> None:
    edm, net = EDM(), build()
    x, rnd, y = batch()
    arguments = {"sigma": edm.sigma_from_normal(rnd, -0.6, 1.2), "noise": torch.randn_like(x)}
    for ratio in (0.0, 0.5):
        order = torch.stack([torch.randperm(16) for _ in range(3)])
        each = edm.loss(net, x, y, **arguments, mask_ratio=ratio, permutation=order, reduction="none")
        assert each.shape == (3,)
        mean = edm.loss(net, x, y, **arguments, mask_ratio=ratio, permutation=order)
        torch.testing.assert_close(mean, each.mean())


def test_masked_loss_counts_kept_patches_only() -> None:
    edm = EDM()
    net = build(use_patch_mixer=False)  # without the mixer a removed patch is seen by nothing
    x, rnd, y = batch()
    sigma, noise = rnd.exp(), torch.randn_like(x)
    order = torch.arange(16).expand(3, 16)
    arguments = {"sigma": sigma, "noise": noise, "mask_ratio": 0.5, "permutation": order}
    loss = edm.loss(net, x, y, **arguments)
    x_changed = x.clone()
    x_changed[:, :, 4:] += 100  # the last eight patches
    torch.testing.assert_close(edm.loss(net, x_changed, y, **arguments), loss)
    x_changed[:, :, :4] += 100
    assert edm.loss(net, x_changed, y, **arguments) > 2 * loss


@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_half_precision_gives_a_float32_loss_and_picture(precision: str) -> None:
    edm, net = EDM(), build(experts_every_n=0)  # a token that rounding moves to another expert is no small difference
    x, rnd, y = batch()
    arguments = {"sigma": rnd.exp(), "noise": torch.randn_like(x)}
    noise = torch.randn_like(x)
    exact = edm.loss(net, x, y, **arguments), edm.sample(net, noise, y, num_inference_steps=4)
    net = net.bfloat16() if precision == "pure" else net
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss = edm.loss(net, x.half(), y.half(), **arguments)
        picture = edm.sample(net, noise, y, num_inference_steps=4)
    for got, wanted in zip((loss, picture), exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sampler": "euler"}, "sampler='euler': expected one of heun"), ({"num_inference_steps": 0}, "at least 1")],
)
def test_wrong_requests(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDM().sample(GaussianNet(), torch.zeros(1, 4, 8, 8), torch.zeros(1, 1, 1), **change)


def test_benchmark_prints_one_object(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "REFERENCE_STEPS", 40)
    monkeypatch.setattr(benchmark, "STEPS", {"heun": (4, 30), "other": (4, 30)})
    assert benchmark.main(["--json", "--train-steps", "2", "--batch", "1", "--guidance-scale", "1"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert printed.count("\n") == 1 and isinstance(result, dict)
    assert {row["sampler"] for row in result["rows"]} == set(SAMPLERS)
    for name in SAMPLERS:
        coarse, fine = (row for row in result["rows"] if row["sampler"] == name)
        assert fine["distance"] < coarse["distance"]
        assert fine["calls"] == (59 if name == "heun" else 30)
    assert result["calls_to_reach_heun_30"]["heun"] == 59
