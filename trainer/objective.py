"""The training objective: one micro-batch to a loss, and the learning rate."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from microdit.model.edm import EDM
from microdit.model.network import MicroDiT
from microdit.trainer.data.batch import MicroBatch
from microdit.trainer.recipe import LegRecipe

NOISE_EDGES = (-2.0, -1.0, 0.0, 1.0, 2.0)  # ln(sigma) between the bins in which the log splits the loss
NOISE_BINS = len(NOISE_EDGES) + 1


class Step(NamedTuple):
    """Results of a step, on the device: its loss, the norm of its gradient, and 1 if that is not finite, else 0.

    noise: (2, NOISE_BINS), sums of the losses and numbers of the samples by noise. flops: of this process.
    """

    loss: Tensor
    norm: Tensor
    bad: Tensor
    noise: Tensor
    flops: int


class Objective(nn.Module):
    """The loss of a micro-batch, and its parts by noise (see `Step`), as one module, which is what DDP wraps."""

    edges: Tensor

    def __init__(self, net: MicroDiT, edm: EDM):
        super().__init__()
        self.net, self.edm = net, edm
        self.register_buffer("edges", torch.tensor(NOISE_EDGES), persistent=False)

    def forward(self, batch: MicroBatch, leg: LegRecipe) -> tuple[Tensor, Tensor]:
        sigma = self.edm.sigma_from_normal(batch.sigma_normal, leg.p_mean, leg.p_std)
        loss = self.edm.loss(
            self.net, batch.latents, batch.text, sigma=sigma, noise=batch.noise, text_mask=batch.text_mask,
            mask_ratio=leg.mask_ratio, permutation=batch.permutation, reduction="none",
        )  # fmt: skip
        parts = torch.stack([loss.detach(), torch.ones_like(loss)])
        noise = parts.new_zeros(2, NOISE_BINS).index_add_(1, torch.bucketize(sigma.log(), self.edges), parts)
        return loss.mean(), noise


def learning_rate(leg: LegRecipe, step: int, length: int, scale: float = 1.0) -> float:
    """Compute the rate of step `step` of a leg that is `length` steps long, `scale` times the recipe's."""
    warmup = math.ceil(leg.warmup * scale / leg.batch)
    if step < warmup:
        return leg.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(length - warmup, 1)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[leg.schedule]
    return leg.final_learning_rate * (1 - left) + leg.learning_rate * left
