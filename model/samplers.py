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
    """Second-order Heun, 2 n - 1 calls for n steps (arXiv 2206.00364, algorithm 1). The released sampler."""
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
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) in terms of sigma, n calls for n steps.

    With lambda = -ln(sigma) a step of size h is x' = e^-h x + (1 - e^-h) D', where D' extrapolates the last two
    denoised states to the middle of the step. The last step, to sigma 0, is the denoised state itself.
    """
    previous, previous_h = None, 0.0
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoiser(x, sigma)
        if following > 0:
            h = math.log(sigma / following)
            target = denoised
            if previous is not None:
                target = denoised + (denoised - previous) * (h / (2 * previous_h))
            x = math.exp(-h) * x - math.expm1(-h) * target
            previous, previous_h = denoised, h
        else:
            x = denoised
        if callback is not None:
            callback(i, x)
    return x


SAMPLERS: dict[str, Sampler] = {"heun": heun, "dpmpp_2m": dpmpp_2m}
