"""Muon (Jordan et al. 2024; Liu et al., arXiv 2502.16982): momentum made orthogonal, for the matrices of the blocks.

    m <- mean of gradients                          the gradient's moving average
    o <- Newton-Schulz(m, looking one step ahead)   all singular values near 1
    w <- w (1 - rate * decay) - rate * 0.2 sqrt(max(rows, columns)) o

The factor gives steps the size that AdamW's have, so that both take one learning rate. The experts' weights (E, d, h)
are E matrices, made orthogonal together.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, steepest at 0
MOMENTUM = 0.95
RMS = 0.2  # of AdamW's steps, about
BLOCKS = ("blocks.", "patch_mixer.", "y_emb_preprocess.")
NOT_MATRICES = ("adaLN_modulation", "mlp.gate")


def has_matrices(name: str, parameter: Tensor) -> bool:
    """Tell if Muon steps a parameter: matrices within blocks, but for adaLN and routers."""
    return parameter.ndim >= 2 and name.startswith(BLOCKS) and not any(part in name for part in NOT_MATRICES)


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (..., n, m) near 1 (0.7 to 1.2), by Newton-Schulz's iteration.

    In bfloat16 on a GPU, in the dtype of the matrices on a CPU.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups with `muon`, whose parameters are stepped as above; `lr` is that of both.

    Where the attribute `found_inf` is 1, nothing changes, as with fused AdamW.
    """

    found_inf: Tensor
    param_groups: list[dict[str, Any]]

    def __init__(self, groups: Iterable[Mapping[str, Any]], **options: Any) -> None:
        super().__init__([{"muon": False, **group} for group in groups], **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups: list[dict[str, Any]] = self.param_groups
        for group in groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, parameter.grad, group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _step(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # AdamW wants it of all that it loads
            state["momentum_buffer"] = torch.zeros_like(parameter)
        good = 1 - getattr(self, "found_inf", torch.zeros((), device=parameter.device))
        gradient = gradient.where(good.bool(), torch.zeros_like(gradient))
        momentum: Tensor = state["momentum_buffer"]
        state["step"] += good
        momentum.lerp_(gradient, (1 - MOMENTUM) * good)
        update = orthogonal(gradient.lerp(momentum, MOMENTUM))
        rate = group["lr"] * good
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.sub_(update * (rate * RMS * math.sqrt(max(parameter.shape[-2:]))))
