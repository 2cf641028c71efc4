"""The training loop: a recipe in, checkpoints, logs and a summary out.

set up -> data -> network -> resume -> (time budget) -> for each stage: for each batch: step, log, checkpoint
"""

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.checkpoint import load_weights
from model.edm import EDM
from model.network import PRESETS, MicroDiT
from pipeline.errors import RequestError
from trainer import checkpoint
from trainer.budget import TimeBudget
from trainer.data import Batch, MicroBatch, ShardCache, StageData, in_thread, open_cache, shapes
from trainer.log import Log, Meter, Progress
from trainer.recipe import Recipe, StageRecipe, identity
from trainer.samples import RunSamples, open_samples
from trainer.team import Signals, Team, joined_team

WARM_STEPS, TIMED_STEPS = 3, 8  # of a stage, to measure the speed
STOP_EVERY = 8  # steps between the moments when all processes agree on whether a signal came


# -- one step --------------------------------------------------------------------------------------------------------


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
    """Network, optimizer and moving average, and the step that changes them."""

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
        options = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=1.0, betas=options.betas, eps=options.eps,
            weight_decay=options.weight_decay, fused=True,
        )  # fmt: skip
        self.ema: dict[str, Tensor] | None = None
        self.bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and has_fast_bf16(team.device))

    def step(self, batch: Batch, stage: StageRecipe, rate: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """One step on this process's part of a batch; returns loss, gradient norm, and 1 if that is not finite, else 0.

        A step whose gradient is not finite changes nothing.
        """
        self.optimizer.param_groups[0]["lr"] = rate
        loss = torch.zeros((), device=self.device)
        for number, part in enumerate(batch.micro_batches):
            last = number == len(batch.micro_batches) - 1
            with self._no_sync(last), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                share = self.objective(part.to(self.device), stage) * (len(part.latents) / len(batch.positions))
            share.backward()
            loss += share.detach()
        # gradients are averaged over processes by now: all see the same norm and do the same
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.optimizer.clip or math.inf)
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # AdamW leaves everything as it is where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        if stage.ema_half_life is None:
            self.ema = None
        else:
            self.ema = self.ema or {name: p.detach().clone() for name, p in self.parameters.items()}
            weight = 1 - 0.5 ** (stage.batch / (stage.ema_half_life * scale))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], weight)
        return loss, norm, bad

    def load(self, found: checkpoint.Checkpoint) -> None:
        load_weights(self.net, found.model, str(found.folder))
        checkpoint.load_optimizer(self.net, self.optimizer, found.optimizer)
        if found.ema is not None:
            self.ema = {name: found.ema[name].to(self.device, copy=True) for name in self.parameters}

    def _no_sync(self, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.objective, DistributedDataParallel) and not last:
            return self.objective.no_sync()
        return nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is the faster way here: every GPU, and CPUs that multiply it (AMX; AVX-512 BF16: twice as fast)."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


# -- the run ---------------------------------------------------------------------------------------------------------


def train(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe to its end, or go on with it from the newest checkpoint in its out folder.

    Returns a summary: checkpoint (folder), images, steps, seconds, loss (of the last line of the log), skipped, scale,
    parameters, and `signal`, the number of the signal that stopped the run, or 0.

    Raises:
        RequestError: corpus, selection, columns, network or checkpoint do not fit the recipe.
        model.checkpoint.CheckpointError: the out folder has checkpoints, and none can be read.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        team = stack.enter_context(joined_team())
        signals = stack.enter_context(Signals())
        log = stack.enter_context(closing(Log(recipe.out, team.rank == 0)))

        # data
        samples = open_samples(recipe)
        cache = stack.enter_context(closing(open_cache(recipe, samples)))
        config = network_config(recipe, samples, cache)
        stages = [
            StageData(recipe, stage, index, cache, config["patch_size"], team.rank, team.world)
            for stage, index in zip(recipe.stages, samples.stages, strict=True)
        ]

        # begin, or go on
        facts = [{"latents": s.stage.latents, "samples": len(s.index), "digest": s.index.digest} for s in stages]
        found = checkpoint.load_latest(recipe.out, log.say)
        learner = Learner(recipe, config, team)
        if found is None:
            progress = Progress([stage.length for stage in recipe.stages])
            log.say(begin_message(recipe, samples, stages, learner))
        else:
            refuse_other_run(found, recipe, facts)
            progress = Progress(**found.state["progress"])
            learner.load(found)
            cache.broken.restore(found.state.get("broken", []))
        total = progress.images(recipe.stages)
        if found is not None and progress.seen < total:
            log.say(f"going on after {progress.seen:,} of {total:,} images, from {found.folder}")
        budget = None
        if recipe.time_budget is not None and progress.seen < total:
            speed = measure_speed(recipe, config, team, stages)
            budget = TimeBudget(progress, recipe.stages, speed, recipe.time_budget - (time.monotonic() - began))
            keep_to_budget(budget, team, log)
        log.open(progress.step)
        meter = Meter(progress, team, log)

        def save() -> None:
            meter.settle()
            for listed in team.gathered(cache.broken.listed()):
                cache.broken.restore(listed)
            if team.rank == 0:
                state = {"recipe": recipe.model_dump(mode="json"), "data": facts, "progress": asdict(progress)}
                state["broken"] = cache.broken.listed()
                info = generate_info(recipe, samples, stages[progress.stage])
                tensors = (learner.net, learner.ema, learner.optimizer)
                checkpoint.save(recipe.out, progress.step, *tensors, state, info, recipe.checkpoint_keep)

        def asked_to_stop() -> bool:
            """Whether a signal came to any process; they ask each other every few steps only."""
            if team.world > 1 and progress.step % STOP_EVERY:
                return False
            signals.received = int(team.largest(signals.received))
            return signals.received > 0

        # the loop
        while (total := progress.images(recipe.stages)) > progress.seen and not signals.received:
            number = progress.stage
            stage, length = recipe.stages[number], progress.lengths[number]
            source = stages[number].batches(progress.step, progress.seen, length - progress.stage_step)
            with closing(in_thread(source)) as batches:
                for batch in meter.waiting(batches):
                    rate = learning_rate(stage, progress.stage_step, length, progress.scale)
                    meter.add(*learner.step(batch, stage, rate, progress.scale))
                    progress.step += 1
                    progress.stage_step += 1
                    progress.seen += stage.batch
                    if progress.step % recipe.log_every == 0 or progress.seen == total:
                        meter.write(number, rate, total - progress.seen)
                        if budget is not None and progress.stage_step < length:
                            budget.observe(meter.speed)
                            if keep_to_budget(budget, team, log):
                                break
                    if asked_to_stop():
                        break
                    if progress.step % recipe.checkpoint_every == 0 and progress.seen < total:
                        save()
            if progress.stage_step == progress.lengths[number] and number + 1 < len(stages):
                progress.stage, progress.stage_step = number + 1, 0

        # end
        if found is None or progress.step > found.state["step"]:
            save()
        folder = recipe.out / "checkpoints" / checkpoint.folder_name(progress.step)
        log.say(
            f"{'stopped' if progress.seen < total else 'finished'}: {progress.seen:,} of {total:,} images, {folder}"
        )
        return {
            "checkpoint": str(folder),
            "images": progress.seen,
            "steps": progress.step,
            "seconds": progress.seconds,
            "loss": progress.loss,
            "skipped": progress.skipped,
            "scale": progress.scale,
            "parameters": sum(p.numel() for p in learner.parameters.values()),
            "signal": signals.received,
        }


def network_config(recipe: Recipe, samples: RunSamples, cache: ShardCache) -> dict[str, Any]:
    """The arguments of `MicroDiT`: the recipe's, with what the columns say."""
    given = dict(recipe.model)
    preset = given.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise RequestError(f"model.preset = {preset!r}: expected one of {', '.join(PRESETS)}")
    found = [
        shapes(cache, index, stage.latents, list(recipe.text))
        for index, stage in zip(samples.stages, recipe.stages, strict=True)
    ]
    (channels, size, _), width = found[0]
    known = {"input_size": size, "in_channels": channels, "caption_channels": width}
    for name, value in known.items():
        if given.get(name, value) != value:
            raise RequestError(f"model.{name} = {given[name]}: the columns say {value}; leave it out")
    for ((other, _, _), _), stage in zip(found, recipe.stages, strict=True):
        if other != channels:
            raise RequestError(
                f"stages: {stage.latents} has {other} channels, {recipe.stages[0].latents} has {channels}; "
                "take latents of one autoencoder"
            )
    try:
        with torch.device("meta"):
            return MicroDiT(**((PRESETS[preset] if preset else {}) | given | known)).config
    except (TypeError, ValueError) as error:
        raise RequestError(f"model: {error}; expected arguments of MicroDiT, or preset") from error


def begin_message(recipe: Recipe, samples: RunSamples, stages: Sequence[StageData], learner: Learner) -> str:
    parameters = sum(p.numel() for p in learner.parameters.values())
    lines = [
        f"{recipe.name}: {parameters / 1e6:.1f}M parameters, {len(stages[-1].index):,} samples, "
        f"{len(samples.held)} more held out, {'bf16' if learner.bf16 else 'fp32'} on {learner.device}"
    ]
    if samples.missing:
        lines.append(f"{samples.missing:,} samples of {recipe.selection} are not in all columns, and left out")
    if (lanes := stages[-1].lanes.count) < recipe.lanes:
        lines.append(f"{recipe.lanes} lanes are more than there are samples: {lanes} lanes")
    return "\n".join(lines)


def measure_speed(recipe: Recipe, config: dict[str, Any], team: Team, stages: Sequence[StageData]) -> list[float]:
    """Seconds that a step of each stage takes: a few steps of a network that is thrown away."""
    seconds = []
    for stage in stages:
        learner, marks = Learner(recipe, config, team), []
        with closing(in_thread(stage.batches(0, 0, WARM_STEPS + TIMED_STEPS))) as batches:
            for batch in batches:
                loss, _, _ = learner.step(batch, stage.stage, rate=stage.stage.learning_rate, scale=1.0)
                loss.item()  # waits for the device
                marks.append(time.perf_counter())
        seconds.append(team.largest((marks[-1] - marks[WARM_STEPS - 1]) / TIMED_STEPS))
    return seconds


def keep_to_budget(budget: TimeBudget, team: Team, log: Log) -> bool:
    """Fit what is left of the run into the time left; whether its stages have other lengths now."""
    progress, before = budget.progress, budget.progress.scale
    if not budget.fit(-team.largest(-budget.share())):
        return False
    if abs(progress.scale - before) > 0.05:
        log.say(
            f"time budget: on this machine there is time for {progress.images(budget.stages):,} images, "
            f"{progress.scale:.0%} of the recipe's"
        )
    return True


def refuse_other_run(found: checkpoint.Checkpoint, recipe: Recipe, facts: list[dict[str, Any]]) -> None:
    """Raises RequestError if a checkpoint is of another recipe, or of other samples."""
    advice = f"put it back, or set out to another folder than {recipe.out}"
    before, now = identity(Recipe.model_validate(found.state["recipe"])), identity(recipe)
    for name in now:
        if before[name] != now[name]:
            raise RequestError(
                f"{found.folder} was made with {name} = {before[name]}, the recipe says {now[name]}; {advice}"
            )
    for old, new in zip(found.state["data"], facts, strict=True):
        if old != new:
            raise RequestError(
                f"{found.folder} was made on {old['samples']:,} samples of {old['latents']} ({old['digest']}), the "
                f"corpus and the selection now give {new['samples']:,} ({new['digest']}); name the selection "
                f"with its hash, or {advice}"
            )


def generate_info(recipe: Recipe, samples: RunSamples, stage: StageData) -> dict[str, Any]:
    """What `model.loading` needs beside the weights; the columns tell text encoder and autoencoder."""
    return {
        "name": recipe.name,
        "latent_shape": stage.latent_shape,
        "sigma_data": recipe.sigma_data,
        "guidance_scale": recipe.guidance_scale,
        "latents": samples.corpus.column(stage.stage.latents).stage,
        "text": samples.corpus.column(stage.text[0]).stage,
    }
