"""Prepare the first step: the network's arguments, its first weights, checks of a checkpoint, trials of step sizes."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from microdit.model.checkpoint import CheckpointError, config_from_state_dict, read_config, read_state_dict
from microdit.model.loading import find_parts
from microdit.model.network import PRESETS, MicroDiT, check_training
from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.trained_with import differences
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.selection.broken_samples import NotingShardCache
from microdit.pipeline.selection.run_samples import RunSamples
from microdit.pipeline.selection.sample_index import largest_scalar
from microdit.pipeline.selection.sample_shapes import sample_shape
from microdit.trainer.checkpoints.contents import Checkpoint
from microdit.trainer.data.batch import MicroBatch
from microdit.trainer.data.batches import LegData
from microdit.trainer.learner import Learner
from microdit.trainer.monitoring.progress import Progress
from microdit.trainer.processes import Team
from microdit.trainer.recipe import AUTO, LEG_CHANGES, LegRecipe, Recipe, identity

CPU_MICRO_BATCH = 32  # what `auto` is on a CPU, where memory is no good measure
WARM_STEPS, TIMED_STEPS = 3, 8  # of a leg, to measure the speed


def begin_message(recipe: Recipe, samples: RunSamples, legs: Sequence[LegData], learner: Learner) -> str:
    """Say what is trained on what, and warn of selections and lanes that are not what they were asked for."""
    from microdit.pipeline.selection.selections import changed_since  # it brings duckdb

    parameters = sum(p.numel() for p in learner.parameters.values())
    lines = [
        f"{recipe.name}: {parameters / 1e6:.1f}M parameters, {len(legs[-1].index):,} samples, "
        f"{len(samples.held)} more held out, {'bf16' if learner.bf16 else 'fp32'} on {learner.device}"
    ]
    if samples.missing:
        selection = recipe.stages[-1].selection or recipe.selection
        lines.append(f"{samples.missing:,} samples of {selection} are not in all columns, and left out")
    for name in dict.fromkeys(selection_names(recipe, samples)):
        if name is not None and (changed := changed_since(samples.corpus, name)):
            lines.append(
                f"{name} was chosen before {', '.join(changed)} changed: its rows are taken as they are now; to choose "
                "again, repeat `microdit select`"
            )
    if (lanes := legs[-1].lanes.count) < recipe.lanes:
        lines.append(f"{recipe.lanes} lanes are more than there are samples: {lanes} lanes")
    return "\n".join(lines)


def refuse_long_captions(recipe: Recipe, samples: RunSamples) -> None:
    """Raise RequestError if a caption is longer than the last of `text_lengths`, by the sidecars of the columns."""
    for column in recipe.text:
        if (samples.longest[column] or 0) <= recipe.text_lengths[-1]:
            continue
        for index in (*{one.digest: one for one in samples.legs}.values(), samples.held):
            longest = largest_scalar(samples.corpus, samples.columns[column], index, "tokens")
            if longest is not None and longest[0] > recipe.text_lengths[-1]:
                raise RequestError(
                    f"text_lengths: {column} has a caption of {longest[0]} tokens ({longest[1]}), the last length is "
                    f"{recipe.text_lengths[-1]}; add {longest[0]}"
                )


def selection_names(recipe: Recipe, samples: RunSamples) -> list[str | None]:
    """Return `name@hash` of each leg's selection, None where there is none."""
    from microdit.pipeline.selection.selections import find_selection  # it brings duckdb

    names = [leg.selection or recipe.selection for leg in recipe.stages]
    return [None if name is None else find_selection(samples.corpus, name) for name in names]


def trained_on(recipe: Recipe, samples: RunSamples) -> list[dict[str, Any]]:
    """Describe what each leg is trained on, for checkpoints."""
    return [
        {"latents": leg.latents, "samples": len(index), "digest": index.digest, "selection": selection}
        for leg, index, selection in zip(recipe.stages, samples.legs, selection_names(recipe, samples), strict=True)
    ]


def find_changes(saved: Checkpoint, recipe: Recipe, data: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List what the recipe changes in the run of a checkpoint.

    Raises:
        RequestError: the run cannot go on with that, or with other samples than `trained_on` gives.
    """
    advice, stage = f"put it back, or set out to another folder than {recipe.out}", saved.state["progress"]["stage"]
    before, now = identity(Recipe.model_validate(saved.state["recipe"])), identity(recipe)
    open_fields = {f"stages.{number}.{name}" for number in range(stage, len(recipe.stages)) for name in LEG_CHANGES}
    changes = []
    for name in now:
        if before.get(name) != now[name]:
            if name not in open_fields and not (name.startswith("optimizer.") and name != "optimizer.name"):
                raise RequestError(
                    f"{saved.name} was made with {name} = {before.get(name)}, the recipe says {now[name]}; {advice}"
                )
            changes.append({"step": saved.state["step"], "name": name, "from": before[name], "to": now[name]})
    for old, new in zip(saved.state["data"], data, strict=True):
        if any(old[name] != new[name] for name in ("latents", "samples", "digest")):
            raise RequestError(
                f"{saved.name} was made on {old['samples']:,} samples of {old['latents']} ({old['digest']}), the "
                f"corpus and the selection now give {new['samples']:,} ({new['digest']}); name the selection "
                f"with its hash, or {advice}"
            )
    return changes


def change_lengths(progress: Progress, recipe: Recipe, changes: Sequence[Mapping[str, Any]]) -> None:
    """Give the legs the lengths that the changes say.

    Raises:
        RequestError: a leg has done more already.
    """
    for number in {int(one["name"].split(".")[1]) for one in changes if one["name"].endswith((".images", ".steps"))}:
        length, done = recipe.stages[number].length, progress.stage_step if number == progress.stage else 0
        if length < done:
            raise RequestError(f"stages.{number}: {length} steps are fewer than the {done} that are done; give more")
        progress.lengths[number] = max(round(length * progress.scale), done, 1)


def generate_info(recipe: Recipe, samples: RunSamples, data: LegData, selection: str | None) -> dict[str, Any]:
    """Collect what `microdit.model.loading` needs beside the weights; the columns tell text encoder and autoencoder."""
    return {
        "name": recipe.name,
        "latent_shape": data.latent_shape,
        "sigma_data": recipe.sigma_data,
        "sigma_min": recipe.sigma_min,
        "guidance_scale": recipe.guidance_scale,
        "latents": samples.corpus.column(data.leg.latents).made_by,
        "text": samples.corpus.column(data.text[0]).made_by,
        "selection": selection,
    }


def network_config(
    recipe: Recipe, samples: RunSamples, cache: NotingShardCache, init: "Init | None" = None
) -> dict[str, Any]:
    """Complete the arguments of `MicroDiT`, the recipe's or those of the weights it starts from, by the columns.

    Raises:
        RequestError: naming what does not fit the columns.
    """
    given = dict(recipe.model)
    preset = given.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise RequestError(f"model.preset = {preset!r}: expected one of {', '.join(PRESETS)}")
    shapes = [
        sample_shape(cache, index, leg.latents, list(recipe.text))
        for index, leg in zip(samples.legs, recipe.stages, strict=True)
    ]
    (channels, size, _), width = shapes[0]
    for ((other, _, _), _), leg in zip(shapes, recipe.stages, strict=True):
        if other != channels:
            raise RequestError(
                f"stages: {leg.latents} has {other} channels, {recipe.stages[0].latents} has {channels}; "
                "take latents of one autoencoder"
            )
    if init is not None:
        for name, value in (("in_channels", channels), ("caption_channels", width)):
            if init.config[name] != value:
                raise RequestError(f"init = {recipe.init}: its {name} is {init.config[name]}, the columns say {value}")
        return init.config
    known = {"input_size": size, "in_channels": channels, "caption_channels": width}
    for name, value in known.items():
        if given.get(name, value) != value:
            raise RequestError(f"model.{name} = {given[name]}: the columns say {value}; leave it out")
    return built_config((PRESETS[preset] if preset else {}) | given | known)


def refuse_misfits(config: Mapping[str, Any], legs: Sequence[LegData]) -> None:
    """Raise RequestError if the network cannot learn from the latents of a leg, or what its mask leaves of them.

    For a run that begins: one that has begun goes on as it is, as its network cannot be changed any more.
    """
    for number, data in enumerate(legs):
        try:
            check_training(config, data.latent_shape, data.text_width, data.leg.mask_ratio)
        except ValueError as error:
            raise RequestError(f"stages.{number}, {data.leg.latents}: {error}") from error


def built_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of the `MicroDiT` that these give.

    Raises:
        RequestError: they give none.
    """
    try:
        with torch.device("meta"):
            return MicroDiT(**arguments).config
    except (TypeError, ValueError) as error:
        raise RequestError(f"model: {error}; expected arguments of MicroDiT, or preset") from error


# -- weights to start from -------------------------------------------------------------------------------------------
class Init:
    """The weights that a recipe starts from (`init`), checked against the columns before they are read.

    Raises:
        RequestError: there is no such checkpoint, it is damaged, or it was trained with other models than the columns.
    """

    def __init__(self, recipe: Recipe, samples: RunSamples):
        self.name = str(recipe.init)
        if recipe.model:
            raise RequestError(f"model: leave it out, init = {self.name} says what the network is")
        try:
            parts = find_parts(self.name)
            latents, text = (
                {column: samples.corpus.column(column).made_by for column in columns}
                for columns in ([leg.latents for leg in recipe.stages], recipe.text)
            )
            if wrong := differences(parts, latents, text, recipe.sigma_data):
                raise RequestError(
                    f"init = {self.name}: {'; '.join(wrong)}. Give columns made as its own were: autoencoder "
                    f"{parts.autoencoder.name}, text encoder {parts.text_encoder.name}, neither trim nor storage"
                )
            self._file, arguments = parts.weights, read_config(parts.weights)
            if arguments is None:  # inferred from the shapes; the file is mapped, so that little of it is read
                arguments = config_from_state_dict(read_state_dict(self._file), **parts.config)
        except (CheckpointError, ModelFilesError) as error:
            raise RequestError(f"init = {self.name}: {error}") from error
        self.config = built_config(arguments | parts.config)

    def load(self, learner: Learner) -> None:
        """Read the weights into a learner's network of this config; a run that goes on has its own.

        Raises:
            RequestError: they are damaged.
        """
        try:
            learner.load_weights(read_state_dict(self._file), self.name)
        except CheckpointError as error:
            raise RequestError(f"init = {self.name}: {error}") from error


# -- what is tried ---------------------------------------------------------------------------------------------------
def with_micro_batch(learner: Learner, data: LegData) -> LegRecipe:
    """Put a number where a leg says `micro_batch: auto`.

    Raises:
        RequestError: not even one image fits into the memory, or parameters are shared out on GPUs.
    """
    leg, team = data.leg, learner.team
    if leg.micro_batch != AUTO:
        return leg
    own = leg.batch // team.world
    if team.device.type == "cpu":
        return leg.model_copy(update={"micro_batch": min(own, CPU_MICRO_BATCH)})
    if learner.sharded:  # each pass needs all processes: one that runs out of memory would leave the others waiting
        raise RequestError("micro_batch: auto cannot be tried with parallel = fsdp; give a number")
    size = largest_that_fits(own, lambda size: _try(learner, data, size))
    return leg.model_copy(update={"micro_batch": int(-team.largest(-size))})


def largest_that_fits(size: int, attempt: Callable[[int], None]) -> int:
    """Return the first of size, size / 2, ... with which `attempt` does not run out of memory."""
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


def _try(learner: Learner, data: LegData, size: int) -> None:
    """Run made-up samples forward and backward, beside what the optimizer and the averages will hold."""
    states = 2 * (not learner.optimizer.state) + len(data.leg.half_lives) - len(learner.averages)
    held = [torch.empty_like(p) for p in learner.parameters.values() for _ in range(states)]
    latents, tokens = torch.zeros(size, *data.latent_shape), data.recipe.text_lengths[-1]
    part = MicroBatch(
        torch.arange(size), latents, torch.zeros(size, tokens, data.text_width),
        torch.ones(size, tokens, dtype=torch.bool), torch.zeros(size), latents,
        None if data.tokens is None else torch.arange(data.tokens).expand(size, -1),
    )  # fmt: skip
    objective = getattr(learner.objective, "module", learner.objective)  # without DDP, which would exchange gradients
    try:
        with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.bf16):
            loss, _ = objective(part.to(learner.device), data.leg)
        loss.backward()
    finally:
        learner.optimizer.zero_grad()
        del held


def measure_speed(recipe: Recipe, config: dict[str, Any], team: Team, legs: Sequence[LegData]) -> list[float]:
    """Measure the seconds that a step of each leg takes: a few steps of a network that is thrown away."""
    seconds = []
    for data in legs:
        learner, marks = Learner(recipe, config, team), []
        with closing(data.batches_ahead(0, 0, WARM_STEPS + TIMED_STEPS)) as batches:
            for batch in batches:
                taken = learner.step(batch, data.leg, rate=data.leg.learning_rate)
                taken.loss.item()  # waits for the device
                marks.append(time.perf_counter())
        seconds.append(team.largest((marks[-1] - marks[WARM_STEPS - 1]) / TIMED_STEPS))
    return seconds
