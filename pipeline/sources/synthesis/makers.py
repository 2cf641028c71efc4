"""Resolve the makers of a source: their models and revisions, the arguments of their calls, their licences."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from microdit.model.device import best_device
from microdit.model.pretrained.hub import ModelFiles, ModelFilesError, fetch, file_sha256
from microdit.pipeline.base.errors import RequestError, first_line
from microdit.pipeline.config.synthesis import LoraOptions, MakerOptions
from microdit.pipeline.sources.synthesis.call_arguments import ArgumentError, call_arguments
from microdit.pipeline.sources.synthesis.diffusers_files import INDEX, PipelineFiles, find_pipeline
from microdit.pipeline.sources.synthesis.drawing import Drawer, diffusers_call, is_out_of_memory, microdit_call
from microdit.pipeline.sources.synthesis.licences import Licence, known_model, licence_of

OWN_CLASS = "MicroDiTPipeline"


@dataclass(frozen=True)
class LoraFiles:
    """A LoRA: its file of weights, and the factor of them."""

    files: ModelFiles
    file: str
    scale: float

    def fetch(self) -> Path:
        """Return the folder with the file on this machine.

        Raises:
            ModelFilesError: it cannot be had.
        """
        if self.files.revision is None:
            return self.files.folder
        return fetch(self.files.name, [self.file], revision=self.files.revision).folder

    def declaration(self) -> dict[str, Any]:
        """Return what the numbers depend on."""
        return {**self.files.origin(self.file), "file": self.file, "scale": self.scale}


@dataclass(frozen=True)
class OwnModel:
    """A model of `MicroDiTPipeline`: what to load, at which revision, and what identifies it."""

    checkpoint: str
    revision: str | None
    identity: dict[str, Any]


@dataclass(frozen=True)
class Maker:
    """A maker, ready to be loaded. Picklable.

    `where` leads to it in the config, for messages.
    """

    where: str
    options: MakerOptions
    model: PipelineFiles | OwnModel
    class_name: str
    arguments: dict[str, Any]
    dtype: str
    licence: Licence
    loras: tuple[LoraFiles, ...]

    @property
    def name(self) -> str:
        """Its name, which seeds depend on."""
        return self.options.label

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return what determines the numbers of its model."""
        return self.model.identity if isinstance(self.model, OwnModel) else self.model.identity()

    def declaration(self) -> dict[str, Any]:
        """Return all that its pictures depend on."""
        return {
            "name": self.name,
            "class": self.class_name,
            "model": self.identity,
            "variant": self.options.variant,
            "weight": self.options.weight,
            "dtype": self.dtype,
            "arguments": self.arguments,
            "lora": [lora.declaration() for lora in self.loras],
            "license": self.licence.name,
        }

    def describe(self) -> str:
        """Say in one line what draws, and how."""
        about, revision = self.fields(), str(self.identity.get("revision") or self.identity.get("sha256"))[:12]
        checked = isinstance(self.model, PipelineFiles) and self.model.safety_checker
        parts = [f"{about.get('steps')} steps", f"guidance {about.get('guidance', 'as trained')}", self.dtype]
        parts += [str(about["size"])] if "size" in about else []
        parts += [] if checked else ["no safety checker"]
        return f"{self.name}: {self.class_name} {about['model']} at {revision}, {', '.join(parts)}"

    def fields(self) -> dict[str, str | int | float | bool]:
        """Return what its pictures say of it."""
        width, height = self.options.sides or (0, 0)
        about: dict[str, Any] = {
            "maker": self.name,
            "model": self.identity.get("repo") or self.identity.get("folder") or self.identity.get("file"),
            "revision": self.identity.get("revision") or self.identity.get("sha256"),
            "steps": self.arguments.get("num_inference_steps"),
            "guidance": self.arguments.get("guidance_scale"),
            "size": f"{width}x{height}" if width else None,
            "license": self.licence.name or None,
            "license_terms": self.licence.terms or None,
            "commercial_use": self.licence.commercial,
        }
        return {name: value for name, value in about.items() if value is not None}

    def load(self) -> Drawer:
        """Load the model on this process's device.

        Raises:
            RequestError: it cannot be loaded.
        """
        try:
            call = self._load_own() if isinstance(self.model, OwnModel) else self._load_diffusers(self.model)
        except RequestError:
            raise
        except Exception as error:  # the libraries raise anything at all on files that do not fit
            kind = "the memory is too small for the model" if is_out_of_memory(error) else "it cannot be loaded"
            detail = (
                str(error) if isinstance(error, ModelFilesError) else f"{type(error).__name__}: {first_line(error)}"
            )
            raise RequestError(f"{self.where}.model = {self.options.model!r}: {kind}: {detail}") from error
        return Drawer(f"{self.where} ({self.name})", call, self.options.batch)

    def _load_own(self) -> Any:
        import torch

        from microdit.model.text_to_image import MicroDiTPipeline

        assert isinstance(self.model, OwnModel)
        pipeline = MicroDiTPipeline.from_pretrained(
            self.model.checkpoint,
            revision=self.model.revision,
            torch_dtype=getattr(torch, self.dtype),
            autoencoder=self.options.autoencoder,
            text_encoder=self.options.text_encoder,
            device=best_device(),
        )
        return microdit_call(pipeline, self.arguments)

    def _load_diffusers(self, model: PipelineFiles) -> Any:
        import diffusers
        import torch

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        folder = model.fetch_all().folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # later versions call it `dtype`
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                folder,
                torch_dtype=getattr(torch, self.dtype),
                variant=model.variant,
                use_safetensors=True,
                local_files_only=True,
            )
        for number, lora in enumerate(self.loras):
            pipeline.load_lora_weights(lora.fetch(), weight_name=lora.file, adapter_name=f"lora{number}")
        if self.loras:
            names = [f"lora{number}" for number in range(len(self.loras))]
            pipeline.set_adapters(names, [lora.scale for lora in self.loras])
        return diffusers_call(pipeline.to(best_device()), self.arguments)


def resolve_maker(where: str, options: MakerOptions) -> Maker:
    """Find a maker's model, and check everything that can be checked without loading it.

    Args:
        where: the path of its block in the config.

    Raises:
        RequestError: one message that names the field.
    """
    try:
        if _is_own(options.model, options.revision):
            return _own_maker(where, options)
        return _diffusers_maker(where, options)
    except ArgumentError as error:
        raise RequestError(f"{where}.{error.field} = {error.value!r}: {error}") from None
    except (ModelFilesError, ValueError) as error:
        raise RequestError(f"{where}.model = {options.model!r}: {error}") from error


def _is_own(model: str, revision: str | None) -> bool:
    """Tell our own models from pipelines of diffusers, by the name, or by the index of a folder or a repository."""
    from microdit.model.loading import ON_HUB, RELEASED

    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            return True
        return ModelFiles(path, path.name, None).read_json(INDEX).get("_class_name") == OWN_CLASS
    if path.is_file() or model.removeprefix("ckpts/") in RELEASED:
        return True
    match = ON_HUB.fullmatch(model)
    if match is None:
        raise ModelFilesError("there is no such folder or file, and it is no repository of the hub (OWNER/NAME)")
    if match["file"]:
        return True
    files = fetch(model, [INDEX], revision=revision)
    return (files.folder / INDEX).is_file() and files.read_json(INDEX).get("_class_name") == OWN_CLASS


def _own_maker(where: str, options: MakerOptions) -> Maker:
    from microdit.model.loading import find_parts
    from microdit.model.text_to_image import MicroDiTPipeline

    for field in ("variant", "lora"):
        if value := getattr(options, field):
            raise ArgumentError(field, value, "it is for pipelines of diffusers, and this is one of ours")
    parts = find_parts(
        options.model,
        revision=options.revision,
        autoencoder=options.autoencoder,
        text_encoder=options.text_encoder,
    )
    revision, path = parts.origin.get("revision"), Path(options.model).expanduser()
    is_pipeline = (path / INDEX).is_file()
    identity: dict[str, Any] = {
        "autoencoder": parts.autoencoder.trained_with or parts.autoencoder.name,
        "text_encoder": parts.text_encoder.trained_with or parts.text_encoder.name,
    }
    if revision is not None:
        identity |= {"repo": parts.origin["checkpoint"], "revision": revision}
    elif is_pipeline:
        identity |= ModelFiles(path, path.resolve().name, None).origin("*")
    else:
        identity |= {"file": parts.weights.name, "sha256": file_sha256(parts.weights, "weights")}
    # the very checkpoint, even if the run has a newer one by then
    checkpoint = options.model if revision is not None else str((path if is_pipeline else parts.weights).absolute())
    arguments = call_arguments(MicroDiTPipeline.__call__, OWN_CLASS, options, None, None)
    licence = licence_of(options.license, options.model, None)
    dtype = options.dtype or "float32"
    model = OwnModel(checkpoint, revision, identity)
    return Maker(where, options, model, OWN_CLASS, arguments, dtype, licence, ())


def _diffusers_maker(where: str, options: MakerOptions) -> Maker:
    for field in ("autoencoder", "text_encoder"):
        if value := getattr(options, field):
            raise ArgumentError(field, value, "it is for our own models, and this is a pipeline of diffusers")
    model = find_pipeline(options.model, options.revision, options.variant)
    known = known_model(model.files.name)
    steps, guidance = (known.steps, known.guidance) if known else (None, None)
    cls = model.pipeline_class()
    arguments = call_arguments(cls.__call__, model.class_name, options, steps, guidance)
    if options.lora and not hasattr(cls, "load_lora_weights"):
        raise ArgumentError("lora", options.lora[0].model, f"a {model.class_name} takes no LoRA")
    if options.lora and find_spec("peft") is None:
        raise ArgumentError("lora", options.lora[0].model, "LoRAs need the package peft: pip install peft")
    loras = tuple(_find_lora(number, lora) for number, lora in enumerate(options.lora))
    licence = licence_of(options.license, model.files.name, model.files)
    dtype = options.dtype or "bfloat16"
    return Maker(where, options, model, model.class_name, arguments, dtype, licence, loras)


def _find_lora(number: int, options: LoraOptions) -> LoraFiles:
    """Fetch a LoRA.

    Raises:
        ArgumentError: its file cannot be had, or is not named.
    """
    try:
        pattern = options.file or "*.safetensors"
        files = fetch(options.model, [pattern], revision=options.revision)
        found = files.matching(pattern)
    except (ModelFilesError, ValueError) as error:
        raise ArgumentError(f"lora.{number}.model", options.model, str(error)) from error
    if len(found) != 1:
        what = f"it has {', '.join(found[:5])}; name one of them" if found else f"it has no {pattern}"
        raise ArgumentError(f"lora.{number}.file", options.file, what)
    return LoraFiles(files, found[0], options.scale)
