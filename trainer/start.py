"""What a run begins with: the network's arguments, and the weights to go on from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from microdit.model.checkpoint import CheckpointError, config_from_state_dict, read_config, read_state_dict
from microdit.model.loading import Part, Parts, find_parts
from microdit.model.network import PRESETS, MicroDiT
from microdit.model.pretrained.hub import ModelFilesError
from microdit.pipeline.base.errors import RequestError
from microdit.trainer.checkpoints.contents import Checkpoint
from microdit.trainer.data.batches import StageData, shapes
from microdit.trainer.data.sample_index import RunSamples
from microdit.trainer.data.shard_cache import ShardCache
from microdit.trainer.learner import Learner
from microdit.trainer.recipe import Recipe, identity


def begin_message(recipe: Recipe, samples: RunSamples, stages: Sequence[StageData], learner: Learner) -> str:
    parameters = sum(p.numel() for p in learner.parameters.values())
    lines = [
        f"{recipe.name}: {parameters / 1e6:.1f}M parameters, {len(stages[-1].index):,} samples, "
        f"{len(samples.held)} more held out, {'bf16' if learner.bf16 else 'fp32'} on {learner.device}"
    ]
    if samples.missing:
        selection = recipe.stages[-1].selection or recipe.selection
        lines.append(f"{samples.missing:,} samples of {selection} are not in all columns, and left out")
    lines += old_selections(recipe, samples)
    if (lanes := stages[-1].lanes.count) < recipe.lanes:
        lines.append(f"{recipe.lanes} lanes are more than there are samples: {lanes} lanes")
    return "\n".join(lines)


def selection_names(recipe: Recipe, samples: RunSamples) -> list[str | None]:
    """`name@hash` of each stage's selection, None where there is none."""
    from microdit.pipeline.selection.selections import find_selection  # it brings duckdb

    names = [stage.selection or recipe.selection for stage in recipe.stages]
    return [None if name is None else find_selection(samples.corpus, name) for name in names]


def old_selections(recipe: Recipe, samples: RunSamples) -> list[str]:
    """What is to be said of selections that were chosen by columns that have other commits now."""
    from microdit.pipeline.selection.selections import changed_since

    names = dict.fromkeys(name for name in selection_names(recipe, samples) if name is not None)
    changed = {name: found for name in names if (found := changed_since(samples.corpus, name))}
    return [
        f"{name} was chosen before {', '.join(found)} changed: its rows are taken as they are now; to choose anew, "
        "`microdit select` again"
        for name, found in changed.items()
    ]


def refuse_other_run(found: Checkpoint, recipe: Recipe, facts: list[dict[str, Any]]) -> None:
    """Raises RequestError if a checkpoint is of another recipe, or of other samples."""
    advice = f"put it back, or set out to another folder than {recipe.out}"
    before, now = identity(Recipe.model_validate(found.state["recipe"])), identity(recipe)
    for name in now:
        if before[name] != now[name]:
            raise RequestError(
                f"{found.name} was made with {name} = {before[name]}, the recipe says {now[name]}; {advice}"
            )
    for old, new in zip(found.state["data"], facts, strict=True):
        if any(old[name] != new[name] for name in ("latents", "samples", "digest")):
            raise RequestError(
                f"{found.name} was made on {old['samples']:,} samples of {old['latents']} ({old['digest']}), the "
                f"corpus and the selection now give {new['samples']:,} ({new['digest']}); name the selection "
                f"with its hash, or {advice}"
            )


def generate_info(recipe: Recipe, samples: RunSamples, stage: StageData) -> dict[str, Any]:
    """What `microdit.model.loading` needs beside the weights; the columns tell text encoder and autoencoder."""
    return {
        "name": recipe.name,
        "latent_shape": stage.latent_shape,
        "sigma_data": recipe.sigma_data,
        "guidance_scale": recipe.guidance_scale,
        "latents": samples.corpus.column(stage.stage.latents).made_by,
        "text": samples.corpus.column(stage.text[0]).made_by,
    }


def network_config(
    recipe: Recipe, samples: RunSamples, cache: ShardCache, init: "Init | None" = None
) -> dict[str, Any]:
    """The arguments of `MicroDiT`: the recipe's, or those of the weights it starts from, with what the columns say.

    Raises:
        RequestError: naming what does not fit the columns.
    """
    given = dict(recipe.model)
    preset = given.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise RequestError(f"model.preset = {preset!r}: expected one of {', '.join(PRESETS)}")
    found = [
        shapes(cache, index, stage.latents, list(recipe.text))
        for index, stage in zip(samples.stages, recipe.stages, strict=True)
    ]
    (channels, size, _), width = found[0]
    for ((other, _, _), _), stage in zip(found, recipe.stages, strict=True):
        if other != channels:
            raise RequestError(
                f"stages: {stage.latents} has {other} channels, {recipe.stages[0].latents} has {channels}; "
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


def built_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the `MicroDiT` that these give.

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
            refuse_other_models(self.name, parts, recipe, samples)
            self._file, arguments = parts.weights, read_config(parts.weights)
            if arguments is None:  # told from the shapes; the file is mapped, so that little of it is read
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


def refuse_other_models(name: str, parts: Parts, recipe: Recipe, samples: RunSamples) -> None:
    """Raises RequestError, which names them all, where columns were not made as what the weights were trained on."""
    wrong = []
    for stage in recipe.stages:
        wrong += _difference(
            parts.autoencoder, stage.latents, samples.corpus.column(stage.latents).made_by, "autoencoder"
        )
    for column in recipe.text:
        declared = samples.corpus.column(column).made_by
        wrong += _difference(parts.text_encoder, column, declared, "encoder")
        if parts.text_encoder.trained_with is None:  # a released one: all 77 positions, in float16
            if declared.get("model", {}).get("trim") and not parts.text_encoder.options.get("trim"):
                wrong.append(f"{column} is trimmed, the weights were trained on the padding too")
            if declared.get("storage", "float16") != "float16":
                wrong.append(f"{column} is stored as {declared['storage']}, the weights were trained on float16")
    if recipe.sigma_data != parts.edm.sigma_data:
        wrong.append(f"sigma_data is {recipe.sigma_data}, the weights were trained with {parts.edm.sigma_data}")
    if wrong:
        raise RequestError(
            f"init = {name}: {'; '.join(dict.fromkeys(wrong))}. Give columns made as its own were: "
            f"autoencoder {parts.autoencoder.name}, text encoder {parts.text_encoder.name}, neither trim nor storage"
        )


def _difference(part: Part, column: str, declared: Mapping[str, Any], kind: str) -> list[str]:
    if part.trained_with is not None:
        if part.trained_with != declared.get("model"):
            return [
                f"{column} is of another {kind} than the weights ({declared.get('model')}, not {part.trained_with})"
            ]
    elif declared.get(kind) != part.name:
        return [f"{column} is of {kind} {declared.get(kind)}, the weights are of {part.name}"]
    return []
