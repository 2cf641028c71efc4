"""One step of training: the loss, its gradient, what AdamW makes of it, and the moving averages."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from microdit.model.checkpoint import load_weights
from microdit.model.device import has_fast_bf16
from microdit.model.edm import EDM
from microdit.model.flops import training_flops
from microdit.model.muon import Muon, has_matrices
from microdit.model.network import MicroDiT
from microdit.model.sharding import own_part, shard_blocks, shared_as, whole, whole_tensors
from microdit.trainer.checkpoints import contents as checkpoint
from microdit.trainer.data.batch import Batch
from microdit.trainer.data.randomness import weights_seed
from microdit.trainer.objective import NOISE_BINS, Objective, Step
from microdit.trainer.processes import Team
from microdit.trainer.recipe import LegRecipe, Recipe


class Learner:
    """Network, optimizer and moving averages, and the step that changes them.

    `averages` holds one {parameter: tensor} for each half-life of the leg, in the recipe's order; none before it.
    """

    def __init__(self, recipe: Recipe, config: dict[str, Any], team: Team):
        torch.manual_seed(weights_seed(recipe.seed))
        self.recipe, self.team, self.device = recipe, team, team.device
        self.net = MicroDiT(**config).to(team.device)
        self.bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and has_fast_bf16(team.device))
        self.sharded = recipe.parallel == "fsdp" and team.world > 1
        if recipe.compile:
            compile_blocks(self.net)
        if self.sharded:
            shard_blocks(self.net, team.device.type, team.world, self.bf16)
        self.objective: nn.Module = Objective(self.net, EDM(sigma_data=recipe.sigma_data)).to(team.device)
        if team.world > 1 and not self.sharded:
            with warnings.catch_warnings():
                # torch 2.13 has another name for `broadcast_buffers`, which 2.11 does not know
                warnings.simplefilter("ignore", FutureWarning)
                self.objective = DistributedDataParallel(
                    self.objective, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self.parameters = dict(self.net.named_parameters())
        self.optimizer = self._optimizer()
        self.averages: list[dict[str, Tensor]] = []
        self._flops = cache(partial(training_flops, self.net))  # of one sample, forward and backward

    def _optimizer(self) -> torch.optim.AdamW:
        options = self.recipe.optimizer
        experts = {name for name in self.parameters if name.endswith(("mlp.w1", "mlp.w2"))}
        muon = options.name == "muon"
        kinds = {name: (name in experts, muon and has_matrices(name, p)) for name, p in self.parameters.items()}
        groups = [
            {
                "params": [p for name, p in self.parameters.items() if kinds[name] == kind],
                "scale": options.expert_rate if kind[0] else 1.0,
                **({"muon": kind[1]} if muon else {}),
            }
            for kind in sorted(set(kinds.values()))
        ]
        return (Muon if muon else torch.optim.AdamW)(
            groups, lr=1.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay, fused=True
        )

    def step(self, batch: Batch, leg: LegRecipe, rate: float, scale: float = 1.0, leg_seen: float = math.inf) -> Step:
        """Take one step on this process's part of a batch.

        A step whose gradient is not finite changes nothing. scale: what the time budget left of the leg. leg_seen:
        images of the leg, this batch included.
        """
        if leg_seen <= leg.batch:  # the leg's first step
            if leg.reset_optimizer:
                self.optimizer.state.clear()
            if leg.ema_start:
                self.averages = []
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss, noise = torch.zeros((), device=self.device), torch.zeros(2, NOISE_BINS, device=self.device)
        flops = 0
        for number, part in enumerate(batch.micro_batches):
            last = number == len(batch.micro_batches) - 1
            with self._synced(last), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                part_loss, part_noise = self.objective(part.to(self.device), leg)
                share = part_loss * (len(part.latents) / len(batch.positions))
            share.backward()
            loss += share.detach()
            noise += part_noise
            flops += len(part.latents) * self._flops(tuple(part.latents.shape[1:]), part.text.shape[1], leg.mask_ratio)
        # gradients are averaged over processes by now: all see the same norm and do the same
        clip = leg.clip or self.recipe.optimizer.clip or math.inf
        norm = whole(nn.utils.clip_grad_norm_(self.parameters.values(), clip))
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # AdamW leaves everything as it is where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average(leg, scale, leg_seen, bad)
        return Step(loss, norm, bad, noise, flops)

    def _average(self, leg: LegRecipe, scale: float, leg_seen: float, bad: Tensor) -> None:
        half_lives = leg.half_lives
        if not self.averages and leg_seen <= leg.ema_start * scale:  # once begun they stay, however the leg grows
            return
        weights = [own_part(p.detach()) for p in self.parameters.values()]
        self.averages = self.averages[: len(half_lives)]
        while len(self.averages) < len(half_lives):  # it begins with the weights of now
            self.averages.append({name: p.detach().clone() for name, p in self.parameters.items()})
        for average, half_life in zip(self.averages, half_lives, strict=True):
            share = (1 - 0.5 ** (leg.batch / (half_life * scale))) * (1 - bad)  # nothing where nothing was learned
            for value, weight in zip(average.values(), weights, strict=True):
                own_part(value).lerp_(weight, share)

    def finite(self) -> bool:
        """Tell if all weights are finite; all processes have to ask together."""
        norms = torch.stack(torch._foreach_norm([own_part(p.detach()) for p in self.parameters.values()]))
        return self.team.largest(float(not norms.isfinite().all())) == 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap the network's weights with the first moving average for the duration of the block. Requires an average.

        In place and weight by weight: whoever holds the parameters still does, and little memory is needed.
        """

        @torch.no_grad()
        def exchange() -> None:
            for name, parameter in self.parameters.items():
                other = self.averages[0][name]
                kept = parameter.clone()
                parameter.copy_(other)
                other.copy_(kept)

        exchange()
        try:
            yield
        finally:
            exchange()

    def drawing_weights(self, keep: bool) -> dict[str, Tensor]:
        """Gather what pictures are drawn with, whole: the first average, or the weights where there is none.

        All processes have to ask together; those that do not `keep` them get none.
        """
        return whole_tensors(self.averages[0] if self.averages else self.parameters, keep)

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Take up the checkpoint that the first process has read; all have to ask together."""
        self.load_weights(saved.model, saved.name)
        checkpoint.load_optimizer(self.net, self.optimizer, saved.optimizer)
        self.averages = [
            {name: shared_as(p.detach(), average[name]) for name, p in self.parameters.items()}
            for average in saved.averages
        ]

    def load_weights(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take up the weights that the first process has; all have to ask together.

        Raises:
            CheckpointError: they do not fit.
        """
        own = self.net.state_dict()
        fitting = {name for name in state if name in own and state[name].shape == own[name].shape}
        shared = {name: shared_as(own[name], state[name]) for name in own if name in fitting}
        load_weights(self.net, {**state, **shared}, source)

    def _synced(self, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients in the last micro-batch's backward pass alone."""
        if isinstance(self.net, FSDPModule):
            self.net.set_requires_gradient_sync(last)
        elif isinstance(self.objective, DistributedDataParallel) and not last:
            return self.objective.no_sync()
        return nullcontext()


def compile_blocks(net: MicroDiT) -> None:
    """Compile each block by itself: minutes less than the whole network, for nearly all of the speed."""
    torch._dynamo.config.recompile_limit = 1024  # every block is of another width, and text comes in several lengths
    for block in (*net.patch_mixer, *net.blocks):
        block.compile()
