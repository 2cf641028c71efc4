"""One step of training: the loss, its gradient, what AdamW makes of it, and the moving averages."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import load_weights
from model.edm import EDM
from model.flops import training_flops
from model.network import MicroDiT
from pipeline.errors import RequestError
from trainer import checkpoint
from trainer.data import Batch, MicroBatch
from trainer.parallel import own_part, shard_blocks, shared_as, whole
from trainer.recipe import AUTO, Recipe, StageRecipe
from trainer.team import Team

NOISE_EDGES = (-2.0, -1.0, 0.0, 1.0, 2.0)  # ln(sigma) between the bins in which the log splits the loss
NOISE_BINS = len(NOISE_EDGES) + 1
CPU_MICRO_BATCH = 32  # what `auto` is on a CPU, where memory is no good measure


class Step(NamedTuple):
    """What a step gave, on the device: its loss, the norm of its gradient, and 1 if that is not finite, else 0.

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

    def forward(self, batch: MicroBatch, stage: StageRecipe) -> tuple[Tensor, Tensor]:
        sigma = self.edm.sigma_from_normal(batch.sigma_normal, stage.p_mean, stage.p_std)
        loss = self.edm.loss(
            self.net, batch.latents, batch.text, sigma=sigma, noise=batch.noise, text_mask=batch.text_mask,
            mask_ratio=stage.mask_ratio, permutation=batch.permutation, reduction="none",
        )  # fmt: skip
        parts = torch.stack([loss.detach(), torch.ones_like(loss)])
        noise = parts.new_zeros(2, NOISE_BINS).index_add_(1, torch.bucketize(sigma.log(), self.edges), parts)
        return loss.mean(), noise


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
        self.recipe, self.team, self.device = recipe, team, team.device
        self.net = MicroDiT(**config).to(team.device)
        self.bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and has_fast_bf16(team.device))
        self.sharded = recipe.parallel == "fsdp" and team.world > 1
        if recipe.compile:
            compile_blocks(self.net)
        if self.sharded:
            shard_blocks(self.net, team, self.bf16)
        objective = Objective(self.net, EDM(sigma_data=recipe.sigma_data)).to(team.device)
        self.objective: nn.Module = objective
        if team.world > 1 and not self.sharded:
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
        self._known_flops: dict[Any, int] = {}

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
    ) -> Step:
        """One step on this process's part of a batch.

        A step whose gradient is not finite changes nothing. scale: as in `Progress`. stage_seen: images of the stage,
        this batch included.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss, noise = torch.zeros((), device=self.device), torch.zeros(2, NOISE_BINS, device=self.device)
        flops = 0
        for number, part in enumerate(batch.micro_batches):
            last = number == len(batch.micro_batches) - 1
            with self._synced(last), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                part_loss, part_noise = self.objective(part.to(self.device), stage)
                share = part_loss * (len(part.latents) / len(batch.positions))
            share.backward()
            loss += share.detach()
            noise += part_noise
            flops += len(part.latents) * self._flops(part, stage)
        # gradients are averaged over processes by now: all see the same norm and do the same
        clip = stage.clip or self.recipe.optimizer.clip or math.inf
        norm = whole(nn.utils.clip_grad_norm_(self.parameters.values(), clip))
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # AdamW leaves everything as it is where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average(stage, scale, stage_seen)
        return Step(loss, norm, bad, noise, flops)

    def _average(self, stage: StageRecipe, scale: float, stage_seen: float) -> None:
        half_lives = stage.half_lives
        if stage_seen <= stage.ema_start * scale:
            self.averages = []
            return
        weights = [own_part(p.detach()) for p in self.parameters.values()]
        self.averages = self.averages[: len(half_lives)]
        while len(self.averages) < len(half_lives):  # it begins with the weights of now
            self.averages.append({name: p.detach().clone() for name, p in self.parameters.items()})
        for average, half_life in zip(self.averages, half_lives, strict=True):
            parts = [own_part(value) for value in average.values()]
            torch._foreach_lerp_(parts, weights, 1 - 0.5 ** (stage.batch / (half_life * scale)))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While it is entered, the network has the weights of the first average, which there must be, and that has its.

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
        """What pictures are drawn with, whole: the first average, or the weights where there is none.

        All processes have to ask together; those that do not `keep` them get none.
        """
        weights = self.averages[0] if self.averages else {name: p.detach() for name, p in self.parameters.items()}
        found = {}
        for name, weight in weights.items():
            full = whole(weight)
            if keep:
                found[name] = full
        return found

    def _flops(self, part: MicroBatch, stage: StageRecipe) -> int:
        """Of one sample, forward and backward."""
        channels, height, width = part.latents.shape[1:]
        key = ((channels, height, width), part.text.shape[1], stage.mask_ratio)
        if key not in self._known_flops:
            self._known_flops[key] = training_flops(self.net, *key)
        return self._known_flops[key]

    def load(self, found: checkpoint.Checkpoint) -> None:
        """What the first process found; all have to ask together."""
        self.load_weights(found.model, found.name)
        checkpoint.load_optimizer(self.net, self.optimizer, found.optimizer, self.team)
        self.averages = [
            {name: shared_as(p.detach(), average[name], self.team) for name, p in self.parameters.items()}
            for average in found.averages
        ]

    def load_weights(self, state: Mapping[str, Tensor], source: str) -> None:
        """The weights that the first process has; all have to ask together.

        Raises:
            CheckpointError: they do not fit.
        """
        own = self.net.state_dict()
        fitting = {name for name in state if name in own and state[name].shape == own[name].shape}
        shared = {name: shared_as(own[name], state[name], self.team) for name in own if name in fitting}
        load_weights(self.net, {**state, **shared}, source)

    def _synced(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged in the last micro-batch's backward pass alone."""
        if isinstance(self.net, FSDPModule):
            self.net.set_requires_gradient_sync(last)
        elif isinstance(self.objective, DistributedDataParallel) and not last:
            return self.objective.no_sync()
        return nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is the faster way here: every GPU, and CPUs that multiply it (AMX; AVX-512 BF16: twice as fast)."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def compile_blocks(net: MicroDiT) -> None:
    """Compile each block by itself: minutes less than the whole network, for nearly all of the speed."""
    torch._dynamo.config.recompile_limit = 1024  # every block is of another width, and text comes in several lengths
    for block in (*net.patch_mixer, *net.blocks):
        block.compile()


# -- micro_batch: auto -----------------------------------------------------------------------------------------------


def with_micro_batch(
    learner: Learner, stage: StageRecipe, team: Team, latent_shape: tuple[int, int, int], text: tuple[int, int]
) -> StageRecipe:
    """The stage with a number where it says `micro_batch: auto`. text: the most tokens, and their width.

    Raises:
        RequestError: not even one image fits into the memory, or parameters are shared out on GPUs.
    """
    if stage.micro_batch != AUTO:
        return stage
    own = stage.batch // team.world
    if team.device.type == "cpu":
        return stage.model_copy(update={"micro_batch": min(own, CPU_MICRO_BATCH)})
    if learner.sharded:  # each pass needs all processes: one that runs out of memory would leave the others waiting
        raise RequestError("micro_batch: auto cannot be tried with parallel = fsdp; give a number")
    size = largest_that_fits(own, lambda size: _try(learner, stage, size, latent_shape, text))
    return stage.model_copy(update={"micro_batch": int(-team.largest(-size))})


def largest_that_fits(size: int, attempt: Callable[[int], None]) -> int:
    """The first of size, size / 2, ... with which `attempt` does not run out of memory."""
    while True:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise RequestError(f"micro_batch: not even one image fits into the memory: {error}") from error
        size = -(-size // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _try(learner: Learner, stage: StageRecipe, size: int, latent_shape: tuple[int, ...], text: tuple[int, int]) -> None:
    """Forward and backward of made-up samples, beside what the optimizer and the averages will hold."""
    states = 2 * (not learner.optimizer.state) + len(stage.half_lives) - len(learner.averages)
    held = [torch.empty_like(p) for p in learner.parameters.values() for _ in range(states)]
    latents = torch.zeros(size, *latent_shape)
    tokens = math.prod(latent_shape[1:]) // learner.net.patch_size**2
    part = MicroBatch(
        torch.arange(size), latents, torch.zeros(size, *text), torch.ones(size, text[0], dtype=torch.bool),
        torch.zeros(size), latents, torch.arange(tokens).expand(size, -1) if stage.mask_ratio else None,
    )  # fmt: skip
    objective = (
        learner.objective.module if isinstance(learner.objective, DistributedDataParallel) else learner.objective
    )
    try:
        with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.bf16):
            loss, _ = objective(part.to(learner.device), stage)
        loss.backward()
    finally:
        learner.optimizer.zero_grad()
        del held
