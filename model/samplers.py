"""Deterministic samplers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma.

Each takes denoiser(x, sigma) -> D, the state x at sigmas[0], and falling noise levels that end in 0, and calls
callback(step, x) after each step. State and arithmetic are in the dtype of x (float64).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor], None] | None
Sampler = Callable[[Denoiser, Tensor, Sequence[float], Callback], Tensor]


def heun(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], callback: Callback = None) -> Tensor:
    """Sample with second-order Heun, 2 n - 1 calls for n steps (arXiv 2206.00364, algorithm 1). As released."""
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        slope = (x - denoiser(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope = 0.5 * (slope + (ahead - denoiser(ahead, following)) / following)
            ahead = x + (following - sigma) * slope
        x = ahead
        if callback is not None:
            callback(i, x)
    return x


def dpmpp_2m(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], callback: Callback = None) -> Tensor:
    """Sample with DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), n calls for n steps."""
    return _multistep(denoiser, x, sigmas, callback, corrected=False)


def unipc(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], callback: Callback = None) -> Tensor:
    """Sample with DPM-Solver++(2M) and UniPC's corrector (UniC-1, arXiv 2302.04867), n calls for n steps.

    The denoiser's output at a predicted state also corrects that state, at no further call.
    """
    return _multistep(denoiser, x, sigmas, callback, corrected=True)


def _multistep(denoiser: Denoiser, x: Tensor, sigmas: Sequence[float], callback: Callback, corrected: bool) -> Tensor:
    """Step with lambda = -ln(sigma): a step of size h is x' = e^-h x + integral of e^(s-h) D over s in [0, h].

    Predictor: D is constant, at the middle of the step, extrapolated from the last two calls. Corrector: D is linear
    between the calls at both ends of the step. The last step, to sigma 0, ends at the denoised state itself.
    """
    before: Tensor | None = None  # the state at the start of the last step
    denoised_before, h_before = x, 0.0
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoiser(x, sigma)
        if corrected and before is not None:
            constant = -math.expm1(-h_before)
            x = math.exp(-h_before) * before + constant * denoised_before
            x = x + (1 - constant / h_before) * (denoised - denoised_before)
        if following > 0:
            h = math.log(sigma / following)
            target = denoised
            if before is not None:
                target = denoised + (denoised - denoised_before) * (h / (2 * h_before))
            before, denoised_before, h_before = x, denoised, h
            x = math.exp(-h) * x - math.expm1(-h) * target
        else:
            x = denoised
        if callback is not None:
            callback(i, x)
    return x


SAMPLERS: dict[str, Sampler] = {"heun": heun, "dpmpp_2m": dpmpp_2m, "unipc": unipc}
