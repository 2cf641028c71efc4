"""One step of training: the loss, its gradient, what AdamW makes of it, and the moving averages."""

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import load_weights
from model.edm import EDM
from model.network import MicroDiT
from trainer import checkpoint
from trainer.data import Batch, MicroBatch
from trainer.recipe import Recipe, StageRecipe
from trainer.team import Team


class Objective(nn.Module):
    """The loss of a micro-batch as one module, which is what DDP wraps."""

    def __init__(self, net: MicroDiT, edm: EDM):
        super().__init__()
        self.net, self.edm = net, edm

    def forward(self, batch: MicroBatch, stage: StageRecipe) -> Tensor:
        sigma = self.edm.sigma_from_normal(batch.sigma_normal, stage.p_mean, stage.p_std)
        return self.edm.loss(
            self.net, batch.latents, batch.text, sigma=sigma, noise=batch.noise, text_mask=batch.text_mask,
            mask_ratio=stage.mask_ratio, permutation=batch.permutation,
        )  # fmt: skip


def learning_rate(stage: StageRecipe, step: int, length: int, scale: float = 1.0) -> float:
    """The rate of step `step` of a stage that is `length` steps long; `scale` as in `Progress`."""
    warmup = math.ceil(stage.warmup * scale / stage.batch)
    if step < warmup:
        return stage.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(length - warmup, 1)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[stage.schedule]
    return stage.final_learning_rate * (1 - left) + stage.learning_rate * left


class Learner:
    """Network, optimizer and moving averages, and the step that changes them.

    `averages` holds one {parameter: tensor} for each half-life of the stage, in the recipe's order; none before its
    start.
    """

    def __init__(self, recipe: Recipe, config: dict[str, Any], team: Team):
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, team.device
        self.net = MicroDiT(**config).to(team.device)
        objective = Objective(self.net, EDM(sigma_data=recipe.sigma_data))
        self.objective: nn.Module = objective
        if team.world > 1:
            with (
                warnings.catch_warnings()
            ):  # torch 2.13 has another name for `broadcast_buffers`, which 2.11 does not know
                warnings.simplefilter("ignore", FutureWarning)
                self.objective = DistributedDataParallel(
                    objective, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self.parameters = dict(self.net.named_parameters())
        self.optimizer = self._optimizer()
        self.averages: list[dict[str, Tensor]] = []
        self.bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and has_fast_bf16(team.device))

    def _optimizer(self) -> torch.optim.AdamW:
        options = self.recipe.optimizer
        experts = {name for name in self.parameters if name.endswith(("mlp.w1", "mlp.w2"))}
        groups = [
            {"params": [p for name, p in self.parameters.items() if (name in experts) == own], "scale": scale}
            for own, scale in ((False, 1.0), (True, options.expert_rate))
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=1.0, betas=options.betas, eps=options.eps,
            weight_decay=options.weight_decay, fused=True,
        )  # fmt: skip

    def step(
        self, batch: Batch, stage: StageRecipe, rate: float, scale: float = 1.0, stage_seen: float = math.inf
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step on this process's part of a batch; returns loss, gradient norm, and 1 if that is not finite, else 0.

        A step whose gradient is not finite changes nothing. scale: as in `Progress`. stage_seen: images of the stage,
        this batch included.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss = torch.zeros((), device=self.device)
        for number, part in enumerate(batch.micro_batches):
            last = number == len(batch.micro_batches) - 1
            with self._no_sync(last), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                share = self.objective(part.to(self.device), stage) * (len(part.latents) / len(batch.positions))
            share.backward()
            loss += share.detach()
        # gradients are averaged over processes by now: all see the same norm and do the same
        clip = stage.clip or self.recipe.optimizer.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), clip)
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # AdamW leaves everything as it is where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average(stage, scale, stage_seen)
        return loss, norm, bad

    def _average(self, stage: StageRecipe, scale: float, stage_seen: float) -> None:
        half_lives = stage.half_lives
        if stage_seen <= stage.ema_start * scale:
            self.averages = []
            return
        weights = [p.detach() for p in self.parameters.values()]
        self.averages = self.averages[: len(half_lives)]
        while len(self.averages) < len(half_lives):  # it begins with the weights of now
            self.averages.append({name: p.detach().clone() for name, p in self.parameters.items()})
        for average, half_life in zip(self.averages, half_lives, strict=True):
            torch._foreach_lerp_(list(average.values()), weights, 1 - 0.5 ** (stage.batch / (half_life * scale)))

    def load(self, found: checkpoint.Checkpoint) -> None:
        load_weights(self.net, found.model, str(found.folder))
        checkpoint.load_optimizer(self.net, self.optimizer, found.optimizer)
        self.averages = [
            {name: average[name].to(self.device, copy=True) for name in self.parameters} for average in found.averages
        ]

    def _no_sync(self, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.objective, DistributedDataParallel) and not last:
            return self.objective.no_sync()
        return nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is the faster way here: every GPU, and CPUs that multiply it (AMX; AVX-512 BF16: twice as fast)."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
