"""Find the files of a diffusers pipeline, and refuse what cannot make pictures, before anything large is loaded."""

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from microdit.model.pretrained.hub import ModelConfig, ModelFiles, ModelFilesError, fetch
from microdit.pipeline.sources.synthesis.licences import CARD

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-\d+-of-\d+)?\.safetensors")
SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Ends of the names of files that are no weights: configs, vocabularies and tokenizers."""
NOT_FROM_TEXT = (
    "mask_image", "control_image", "video", "num_frames", "frames", "audio_duration", "audio_length_in_s",
)  # fmt: skip
"""Arguments of pipelines that need other than a prompt, or make other than pictures."""
IMAGE_OPTIONAL = (
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "Flux2KleinKVPipeline",
    "GlmImagePipeline",
    "QwenImage21Pipeline",
)
"""Text-to-image pipelines that also take pictures; other ones with an `image` need it, whatever its default is."""


@dataclass(frozen=True)
class PipelineFiles:
    """A diffusers pipeline: its class, and the files to load."""

    files: ModelFiles
    """Of the small files alone, until `fetch_all`."""
    class_name: str
    patterns: tuple[str, ...]
    """All files that are loaded."""
    variant: str | None
    safety_checker: bool
    """It looks for pictures that are not safe."""

    def pipeline_class(self) -> Any:
        """Return the class of diffusers."""
        import diffusers

        return getattr(diffusers, self.class_name)

    def fetch_all(self) -> ModelFiles:
        """Fetch the weights, too.

        Raises:
            ModelFilesError: they cannot be had.
        """
        if self.files.revision is None:
            return self.files
        return fetch(self.files.name, self.patterns, revision=self.files.revision)

    def identity(self) -> dict[str, str]:
        """Identify the model's bytes: by repository and commit, or by a folder's name and hash."""
        return self.files.origin(*self.patterns)


def find_pipeline(model: str, revision: str | None, variant: str | None) -> PipelineFiles:
    """Find a pipeline of diffusers in a folder or a hub repository; of that, only small files are fetched.

    Raises:
        ModelFilesError: there is no such model, a part of it is missing, or it is no text-to-image pipeline.
        ValueError: a revision of a folder.
    """
    files = fetch(model, [INDEX, CARD], revision=revision)
    if not (files.folder / INDEX).is_file():
        raise ModelFilesError(f"{files.name} has no {INDEX}: it is no pipeline of diffusers")
    index = files.read_json(INDEX)
    name, cls = _pipeline_class(files, index)
    parts = _parts(files, index)
    _check_complete(files, cls, parts)
    patterns = _patterns(files, parts, _listing(files), variant)
    if files.revision is not None:
        small = [pattern for pattern in patterns if not pattern.endswith(".safetensors")]
        files = replace(fetch(files.name, small, revision=files.revision), name=files.name)
    return PipelineFiles(files, name, tuple(patterns), variant, "safety_checker" in parts)


def _pipeline_class(files: ModelFiles, index: ModelConfig) -> tuple[str, Any]:
    """Return the name of the pipeline's class, and the class.

    Raises:
        ModelFilesError: the diffusers here has no such class, or it does not make pictures of prompts.
    """
    import diffusers

    name = index.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier():
        raise ModelFilesError(
            f"{files.name}: its {INDEX} names the class {name!r}, which is none of diffusers; a pipeline with Python "
            "code of its own is never run here"
        )
    cls = getattr(diffusers, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ModelFilesError(
            f"{files.name}: it is a {name}, which diffusers {diffusers.__version__} does not have; install a version "
            "that has it, or take another model"
        )
    takes = inspect.signature(cls.__call__).parameters
    lacks = [argument for argument in ("prompt", "generator", "output_type") if argument not in takes]
    needs = [argument for argument in NOT_FROM_TEXT if argument in takes]
    needs += ["image"] if "image" in takes and name not in IMAGE_OPTIONAL else []
    if lacks or needs:
        why = f"it takes no {' and no '.join(lacks)}" if lacks else f"it takes {' and '.join(needs)}"
        raise ModelFilesError(
            f"{files.name}: it is a {name}, which does not make pictures of prompts alone ({why}); take a "
            "text-to-image pipeline"
        )
    return name, cls


def _parts(files: ModelFiles, index: ModelConfig) -> dict[str, str]:
    """Return the library of each part that the index names.

    Raises:
        ModelFilesError: a part is Python code of the model's own.
    """
    parts = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        library, cls = str(entry[0]), str(entry[1])
        module = library.partition(".")[0]
        if module not in LIBRARIES and not _is_own_module(library):
            raise ModelFilesError(
                f"{files.name}: its part {name} is {library}.{cls}, code of its own, which is never run here"
            )
        parts[name] = library
    return parts


def _is_own_module(library: str) -> bool:
    """Return True for a module of diffusers' pipelines: indexes name safety checkers as `stable_diffusion`."""
    import diffusers

    return bool(library.isidentifier() and hasattr(diffusers.pipelines, library))


def _check_complete(files: ModelFiles, cls: Any, parts: Collection[str]) -> None:
    """Refuse an index without parts that the pipeline cannot do without.

    Raises:
        ModelFilesError: one is missing.
    """
    needed = {
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name != "self" and parameter.default is inspect.Parameter.empty and parameter.kind.name != "VAR_KEYWORD"
    }
    optional = set(getattr(cls, "_optional_components", ()))
    if missing := sorted(needed - optional - set(parts)):
        raise ModelFilesError(f"{files.name}: its {INDEX} lacks {', '.join(missing)}, which a {cls.__name__} needs")


def _listing(files: ModelFiles) -> list[str]:
    """List all files of the folder, or of the repository's commit.

    Raises:
        ModelFilesError: the hub cannot be asked, and the cache is not enough.
    """
    if files.revision is None:
        return files.matching("*")
    from huggingface_hub import HfApi, errors

    try:
        return list(HfApi().list_repo_files(files.name, revision=files.revision))
    except (errors.HTTPError, OSError) as error:
        there = files.matching("*")
        if any(file.endswith(".safetensors") for file in there):
            return there  # without a network: what was downloaded before
        raise ModelFilesError(
            f"the files of {files.name} at {files.revision} cannot be listed: {str(error).splitlines()[0]}"
        ) from error


def _patterns(files: ModelFiles, parts: Mapping[str, str], listing: Collection[str], variant: str | None) -> list[str]:
    """Choose the files to load: all small ones of each part, and one copy of its weights, of the variant if asked for.

    Raises:
        ModelFilesError: a part has no files, or its weights are in no format that is read.
    """
    patterns = [INDEX, CARD]
    found = False
    for part in parts:
        inside = [file for file in listing if file.startswith(f"{part}/") and file.count("/") == 1]
        if not inside:
            raise ModelFilesError(f"{files.name} lacks its part {part}: there is no folder {part}")
        names = {file: Path(file).name for file in inside}
        weights = {file: match for file, name in names.items() if (match := WEIGHTS.fullmatch(name))}
        wanted = [file for file, match in weights.items() if match["variant"] == variant]
        found |= bool(wanted)
        chosen = wanted or [file for file, match in weights.items() if match["variant"] is None]
        holds_model = any(name == "config.json" for name in names.values())
        if holds_model and not chosen:
            other = f"; it has the variants {', '.join(sorted({str(m['variant']) for m in weights.values()}))}"
            raise ModelFilesError(
                f"{files.name} lacks weights of its part {part} in the format safetensors, the only one that is "
                f"read{other if weights else ''}"
            )
        patterns += [*(file for file, name in names.items() if name.endswith(SMALL)), *chosen]
    if variant is not None and not found:
        raise ModelFilesError(f"{files.name} has no weights of the variant {variant}")
    return sorted(patterns)
