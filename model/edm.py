"""EDM (Karras et al., arXiv 2206.00364) with MicroDiT's constants: preconditioning, training loss, sampling.

x = x0 + sigma * noise
D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                    table 1 of the paper
c_skip = sd^2 / (sigma^2 + sd^2)       c_out = sigma sd / sqrt(sigma^2 + sd^2)
c_in = 1 / sqrt(sigma^2 + sd^2)        c_noise = ln(sigma) / 4
loss = (sigma^2 + sd^2) / (sigma sd)^2 * |D - x0|^2
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from microdit.model.network import MicroDiT
from microdit.model.samplers import SAMPLERS


@dataclass(frozen=True)
class EDM:
    """The constants. sigma_data: deviation of the latents. sigma_min, sigma_max, rho: the noise levels of sampling.

    Below the noise that a network was trained on its output is worth nothing: sigma_min is then raised, and the last
    step leads from there to the clean latents.
    """

    sigma_data: float = 0.9
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: expected 0 < sigma_min < sigma_max"
            )

    @staticmethod
    def sigma_from_normal(rnd: Tensor, p_mean: float, p_std: float) -> Tensor:
        """Compute training noise levels exp(p_mean + p_std * rnd) from standard normals, same shape."""
        return (rnd * p_std + p_mean).exp()

    def preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute c_skip, c_out, c_in as (B, 1, 1, 1) and c_noise as (B,), from sigma (B,)."""
        s = sigma.view(-1, 1, 1, 1)
        variance = s**2 + self.sigma_data**2
        root = variance.sqrt()
        return self.sigma_data**2 / variance, s * self.sigma_data / root, 1 / root, sigma.log() / 4

    def denoise(
        self,
        net: MicroDiT,
        x: Tensor,
        sigma: Tensor | float,
        y: Tensor,
        text_mask: Tensor | None = None,
        guidance_scale: float = 1.0,
        negative: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute D(x; sigma) in float32, (B, C, H, W), from noisy x (B, C, H, W).

        sigma: one number, or (B,). With guidance_scale != 1 the network runs once on [x; x], [y; negative] and
        F = u + guidance_scale * (c - u). text_mask: bool (B, L), as in `MicroDiT.forward`. negative: what to steer away
        from, shaped as y; None: zero embeddings. negative_mask: its mask, where y has one; None: that of y.
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1)
        c_skip, c_out, c_in, c_noise = self.preconditioning(sigma)
        if guidance_scale == 1:
            f = net(c_in * x, c_noise, y, text_mask)["sample"].float()
        else:
            negative = torch.zeros_like(y) if negative is None else negative.to(y).expand_as(y)
            if text_mask is not None:
                text_mask = torch.cat([text_mask, text_mask if negative_mask is None else negative_mask])
            c_noise = c_noise.expand(x.shape[0])
            f = net((c_in * x).repeat(2, 1, 1, 1), c_noise.repeat(2), torch.cat([y, negative]), text_mask)
            conditional, unconditional = f["sample"].float().chunk(2)
            f = unconditional + guidance_scale * (conditional - unconditional)
        return c_skip * x + c_out * f

    def loss(
        self,
        net: MicroDiT,
        x0: Tensor,
        y: Tensor,
        *,
        sigma: Tensor,
        noise: Tensor,
        text_mask: Tensor | None = None,
        mask_ratio: float = 0.0,
        permutation: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Compute the weighted denoising loss: the mean over samples, or (B,) with reduction="none"; float32.

        x0, noise: (B, C, H, W); sigma: (B,). With mask_ratio > 0 a sample's loss is the mean over the patches that
        the network kept. permutation: as in `MicroDiT.forward`.
        """
        x0 = x0.float()
        sigma = sigma.float().reshape(-1)
        c_skip, c_out, c_in, c_noise = self.preconditioning(sigma)
        x = x0 + noise.float() * sigma.view(-1, 1, 1, 1)
        out = net(c_in * x, c_noise, y, text_mask, mask_ratio, permutation)
        error = (c_skip * x + c_out * out["sample"].float() - x0).square()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        if mask_ratio > 0:
            kept = 1 - out["mask"]
            rows, columns = (n // net.patch_size for n in x0.shape[2:])
            patches = error.mean(dim=1).unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).mean(dim=(2, 4)).flatten(1)
            error = (patches * kept).sum(dim=1) / kept.sum(dim=1)
        else:
            error = error.flatten(1).mean(dim=1)
        loss = weight * error
        return loss.mean() if reduction == "mean" else loss

    def sigmas(self, steps: int) -> Tensor:
        """Compute noise levels, float64 (steps + 1,), falling from sigma_max to sigma_min, then 0 (eq. 5)."""
        ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return torch.cat([(high + ramp * (low - high)) ** self.rho, torch.zeros(1, dtype=torch.float64)])

    @torch.no_grad()
    def sample(
        self,
        net: MicroDiT,
        latents: Tensor,
        y: Tensor,
        *,
        text_mask: Tensor | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        callback: Callable[[int, Tensor], None] | None = None,
        sampler: str = "heun",
        guidance_interval: tuple[float, float] | None = None,
        negative: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> Tensor:
        """Turn unit noise `latents` (B, C, H, W) into clean latents, float32. The state is float64.

        sampler: a name of `microdit.model.samplers.SAMPLERS`; "heun" is the released one (2 * steps - 1 network calls).
        guidance_scale: applies above 1 only. guidance_interval: (low, high), guidance only where low < sigma <= high
        (arXiv 2404.07724). callback(step, x): after each step, x the float64 state. negative: as in `denoise`.
        """
        Sampling(num_inference_steps, guidance_scale, sampler, guidance_interval).check()
        low, high = guidance_interval or (0.0, math.inf)

        def denoiser(x: Tensor, sigma: float) -> Tensor:
            scale = guidance_scale if guidance_scale > 1 and low < sigma <= high else 1.0
            d = self.denoise(net, x.float(), sigma, y, text_mask, scale, negative, negative_mask)
            return d.double()

        sigmas = self.sigmas(num_inference_steps).tolist()
        return SAMPLERS[sampler](denoiser, latents.double() * sigmas[0], sigmas, callback).float()


@dataclass(frozen=True)
class Sampling:
    """Options of sampling; the fields are arguments of `EDM.sample`."""

    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    sampler: str = "heun"
    guidance_interval: tuple[float, float] | None = None

    def check(self) -> None:
        """Refuse what `EDM.sample` cannot take, before a model is loaded.

        Raises:
            ValueError: a field is out of range; the message names it.
        """
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={self.num_inference_steps}: expected at least 1")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"guidance_scale={self.guidance_scale}: expected 0 or more (5 is usual, up to 1 is no guidance)"
            )
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r}: expected one of {', '.join(SAMPLERS)}")
        interval = self.guidance_interval
        if interval is not None and not 0 <= interval[0] < interval[1]:
            raise ValueError(f"guidance_interval={interval}: expected noise levels (low, high), 0 <= low < high")
