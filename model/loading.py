"""Find the parts of a checkpoint, on this machine or on the hub, before anything large is loaded.

a run's folder, or one of its checkpoints        generate.json beside model.safetensors and ema.safetensors
a pipeline, as a folder or a hub repository      model_index.json, transformer/, vae/, text_encoder/
a file of weights, here or in a hub repository   owner/name/path/to/file.pt
a released checkpoint                            VSehwag24/MicroDiT/ckpts/NAME.pt, or NAME.pt alone
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from microdit.model.checkpoint import SUFFIXES, CheckpointError, write_state_dict
from microdit.model.edm import EDM
from microdit.model.network import MicroDiT
from microdit.model.network_config import SIDE
from microdit.model.pretrained.autoencoder import Autoencoder
from microdit.model.pretrained.hub import ModelFilesError, fetch, new_folder
from microdit.model.pretrained.text import TextEncoder
from microdit.model.strict_json import read_json

STEP_FOLDER = re.compile(r"step-\d+")


# owner/name, owner/name/file, or the address of a file's page or download, whatever the host
ON_HUB = re.compile(
    r"(?:https?://[^/]+/)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:(?:/(?:resolve|blob)/(?P<revision>[^/]+))?/(?P<file>[^?]+)(?:\?.*)?)?"
)

INFO = "generate.json"
INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name, in transformer/
PIPELINE = "MicroDiTPipeline"


# Nothing that could hold a pickle is ever fetched of a pipeline.
PIPELINE_FILES = [
    f"{folder}/*.{suffix}"
    for folder in ("transformer", "vae", "text_encoder")
    for suffix in ("json", "txt", "model", "safetensors")
]

MOST_TOKENS = 1 << 16  # of a caption
LOADING = ("dtype", "max_tokens", "hidden_layer", "template", "trim")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RELEASED_REPO = "VSehwag24/MicroDiT"


# The autoencoder of each. All: XL/2 at 512 px, text of dfn-clip-h.
RELEASED = {
    "dit_4_channel_22M_real_only_data.pt": "sdxl",
    "dit_4_channel_37M_real_and_synthetic_data.pt": "sdxl",
    "dit_16_channel_37M_real_and_synthetic_data.pt": "ostris",
    "dit_4_channel_0.5B_synthetic_data.pt": "sdxl",
}

RELEASED_TEXT = "dfn-clip-h"
RELEASED_CONFIG = {"input_size": 64, "pos_interp_scale": 2.0}

_EXPECTED = (
    "expected the out folder of a training run, one of its checkpoints, a pipeline's folder or hub repository "
    f"(owner/name), or a file of weights ({', '.join(SUFFIXES)}), here or on the hub (owner/name/file); released are "
    + ", ".join(RELEASED)
)


@dataclass(frozen=True)
class Part:
    """An autoencoder or a text encoder: `where` and `options` for its loader, and its name for people.

    trained_with: the fingerprint that the training saw, None if it is not known.
    """

    where: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    trained_with: dict[str, Any] | None = None


@dataclass(frozen=True)
class Parts:
    """All parts of a pipeline.

    weights, config: file of the network, and arguments of `MicroDiT` that it does not tell. sample_size: height
    and width of the latents, None for what the network was built for. origin: what is written into pictures.
    """

    weights: Path
    autoencoder: Part
    text_encoder: Part
    config: dict[str, Any] = field(default_factory=dict)
    sample_size: tuple[int, int] | None = None
    edm: EDM = field(default_factory=EDM)
    guidance_scale: float = 5.0
    origin: dict[str, str] = field(default_factory=dict)


def find_parts(
    checkpoint: str | Path,
    *,
    revision: str | None = None,
    autoencoder: str | None = None,
    text_encoder: str | None = None,
) -> Parts:
    """Find the parts of any of the checkpoints above. What exists on this machine is never looked for on the hub.

    revision: commit, tag or branch of the hub repository. autoencoder, text_encoder: names of
    `model.pretrained.autoencoder` and `model.pretrained.text`, folders or hub repositories, in place of those that
    the checkpoint names.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it does not say what it needs.
        microdit.model.pretrained.hub.ModelFilesError: its files cannot be had from the hub.
    """
    named = (
        (Part(autoencoder, autoencoder) if autoencoder else None),
        (Part(text_encoder, text_encoder) if text_encoder else None),
    )
    path = Path(checkpoint).expanduser()
    if not path.exists():
        return _find_on_hub(str(checkpoint), revision, *named)
    if revision is not None:
        raise CheckpointError(f"revision={revision!r} was given with {path}, which is on this machine and has none")
    if path.is_file():
        return _parts_of_file(path, {"checkpoint": path.as_posix()}, *named)
    if (path / INDEX).is_file():
        return _parts_of_pipeline(path, {"checkpoint": path.as_posix()}, *named)
    folder = find_checkpoint(path)
    ema = folder / "ema.safetensors"
    weights = ema if ema.is_file() or _lists(folder, ema.name) else folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{folder} is not whole: it has no {weights.name}; take another checkpoint")
    return _parts_of_file(weights, {"checkpoint": weights.as_posix()}, *named)


def _lists(folder: Path, file: str) -> bool:
    """Tell if a checkpoint's state.json lists this file."""
    try:
        return file in read_json(folder / "state.json")["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checkpoint_folders(out: Path) -> list[Path]:
    """List the checkpoints in a run's folder, or in one of checkpoints alone, the newest first."""
    folder = out / "checkpoints" if (out / "checkpoints").is_dir() else out
    steps = (f for f in folder.glob("step-*") if STEP_FOLDER.fullmatch(f.name) and f.is_dir())
    return sorted(steps, key=lambda f: int(f.name[5:]), reverse=True)


def find_checkpoint(path: str | Path) -> Path:
    """Find a checkpoint folder: the path itself, or the newest one of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    for folder in (path, *checkpoint_folders(path)):
        if (folder / INFO).is_file():
            return folder
    raise CheckpointError(f"{path}: there is no checkpoint; {_EXPECTED}")


def _find_on_hub(name: str, revision: str | None, autoencoder: Part | None, text_encoder: Part | None) -> Parts:
    if name.removeprefix("ckpts/") in RELEASED:
        name = f"{RELEASED_REPO}/ckpts/{name.removeprefix('ckpts/')}"
    match = ON_HUB.fullmatch(name)
    if match is None or (match["file"] and Path(match["file"]).suffix not in SUFFIXES):
        raise CheckpointError(f"{name}: there is no checkpoint; {_EXPECTED}")
    repo, file, revision = match["repo"], match["file"], revision or match["revision"]
    if name == RELEASED_REPO:
        raise CheckpointError(f"{name} holds several checkpoints, name one: {', '.join(RELEASED)}")
    try:
        files = fetch(repo, [file or INDEX], revision=revision)
        if file is None and (files.folder / INDEX).is_file():
            files = fetch(repo, [INDEX, *PIPELINE_FILES], revision=files.revision)
    except ModelFilesError as error:
        raise ModelFilesError(f"{name}: there is no such file or folder here, and on the hub: {error}") from error
    if not (files.folder / (file or INDEX)).is_file():
        raise CheckpointError(f"the hub repository {repo} has no {file or INDEX} at {files.revision}; {_EXPECTED}")
    origin = {"checkpoint": f"{repo}/{file}" if file else repo, "revision": str(files.revision)}
    if file is None:
        return _parts_of_pipeline(files.folder, origin, autoencoder, text_encoder)
    return _parts_of_file(files.folder / file, origin, autoencoder, text_encoder)


def _parts_of_file(path: Path, origin: dict[str, str], autoencoder: Part | None, text_encoder: Part | None) -> Parts:
    """Find the parts of a file of weights, by `generate.json` beside it, or by what is known of the released ones."""
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: there is no checkpoint; {_EXPECTED}")
    if (path.parent / INFO).is_file():
        return _parts_of_run(path, origin, autoencoder, text_encoder)
    config: dict[str, Any] = {}
    if path.name in RELEASED:
        config = RELEASED_CONFIG
        autoencoder = autoencoder or Part(RELEASED[path.name], RELEASED[path.name])
        text_encoder = text_encoder or Part(RELEASED_TEXT, RELEASED_TEXT)
    if autoencoder is None or text_encoder is None:
        raise CheckpointError(
            f"{path} is a file of weights, which does not say what it was trained with: "
            "name the autoencoder and the text encoder"
        )
    return Parts(path, autoencoder, text_encoder, config, origin=origin)


def _parts_of_run(path: Path, origin: dict[str, str], autoencoder: Part | None, text_encoder: Part | None) -> Parts:
    """Find the parts of a checkpoint that the trainer wrote, by the declarations of the columns that it trained on."""
    info = _read_json(path.parent / INFO, "take an older checkpoint")
    try:
        _, *sample_size = info["latent_shape"]
        return Parts(
            path,
            autoencoder or trained_part(info["latents"], "autoencoder"),
            text_encoder or trained_part(info["text"], "encoder"),
            sample_size=_sides(sample_size),
            edm=EDM(
                sigma_data=float(info.get("sigma_data", EDM.sigma_data)),
                sigma_min=float(info.get("sigma_min", EDM.sigma_min)),
            ),
            guidance_scale=float(info.get("guidance_scale", Parts.guidance_scale)),
            origin=origin,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path.parent / INFO} is damaged ({error!r}: latent_shape, latents and text are needed); "
            "take an older checkpoint"
        ) from error


def trained_part(declaration: Mapping[str, Any], kind: str) -> Part:
    """Read the part from what a column declares. Its `revision` may be a branch; the model's own is the commit."""
    model = declaration.get("model")
    options = _loading_options(model or {})
    revision = (model or {}).get("revision") or declaration.get("revision")
    return Part(declaration[kind], str(declaration[kind]), {"revision": revision, **options}, model)


def _parts_of_pipeline(
    folder: Path, origin: dict[str, str], autoencoder: Part | None, text_encoder: Part | None
) -> Parts:
    """Find the parts of a folder that `MicroDiTPipeline.save_pretrained` wrote.

    The names of classes in its index are for people: older folders have `model.network` for our network.
    """
    index = _read_json(folder / INDEX, "save the pipeline again")
    if index.get("_class_name") != PIPELINE:
        raise CheckpointError(f"{folder / INDEX}: it is a {index.get('_class_name')}, expected a {PIPELINE}")
    config = _read_json(folder / "transformer" / "config.json", "save the pipeline again")
    try:
        encoders = {
            kind: Part(str(folder / kind), str(options["name"]), _loading_options(options))
            for kind, options in ((kind, index[f"{kind}_options"]) for kind in ("vae", "text_encoder"))
        }
        return Parts(
            folder / "transformer" / WEIGHTS,
            autoencoder or encoders["vae"],
            text_encoder or encoders["text_encoder"],
            {key: value for key, value in config.items() if not key.startswith("_")},
            _sides(index["sample_size"]),
            EDM(**{key: float(value) for key, value in index["edm"].items()}),
            float(index["guidance_scale"]),
            origin,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({error!r}); save the pipeline again") from error


def _sides(sample_size: Sequence[Any]) -> tuple[int, int]:
    """Check height and width of the latents. Raises ValueError, TypeError, OverflowError."""
    height, width = (int(side) for side in sample_size)
    if not (1 <= height <= SIDE and 1 <= width <= SIDE):
        raise ValueError(f"latents of {height} x {width}: expected sides of 1 to {SIDE}")
    return height, width


def _loading_options(model: Mapping[str, Any]) -> dict[str, Any]:
    """Take the loader's options from a fingerprint, or from a pipeline's index. Raises ValueError, TypeError."""
    if "max_tokens" in model and not 1 <= int(model["max_tokens"]) <= MOST_TOKENS:
        raise ValueError(f"max_tokens={model['max_tokens']}: expected 1 to {MOST_TOKENS}")
    return {key: DTYPES[model[key]] if key == "dtype" else model[key] for key in LOADING if key in model}


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it is no JSON object); {advice}")
    return content


def check_trained_with(part: Part, model: Any, kind: str) -> None:
    """Refuse a model that is another one than the training saw.

    Raises:
        CheckpointError: the fingerprints differ.
    """
    if part.trained_with is not None and part.trained_with != model.fingerprint:
        raise CheckpointError(
            f"the checkpoint was trained with another {part.name!r} than the one here: {part.trained_with}, now "
            f"{model.fingerprint}. Name the one to take ({kind}=)"
        )


def write_pipeline(
    folder: Path,
    transformer: MicroDiT,
    vae: Autoencoder,
    text_encoder: TextEncoder,
    *,
    edm: EDM,
    guidance_scale: float,
    sample_size: tuple[int, int],
    names: Mapping[str, Any],
) -> None:
    """Write the folder of a pipeline. names: other names of `autoencoder` and `text_encoder` than their own.

    Raises:
        FileExistsError: the folder has something in it.
    """
    (new_folder(folder) / "transformer").mkdir()
    config = {"_class_name": "MicroDiT", **transformer.config}
    (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_state_dict(folder / "transformer" / WEIGHTS, transformer.state_dict(), transformer.config)
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")

    def options(model: Autoencoder | TextEncoder, name: str) -> dict[str, Any]:
        loading = {key: model.fingerprint[key] for key in LOADING if key in model.fingerprint}
        return {"name": names.get(name, model.name), **loading}

    index = {
        "_class_name": PIPELINE,
        "transformer": ["microdit.model.network", "MicroDiT"],
        "vae": ["diffusers", vae.class_name],
        "text_encoder": ["transformers", text_encoder.class_name],
        "vae_options": options(vae, "autoencoder"),
        "text_encoder_options": options(text_encoder, "text_encoder"),
        "sample_size": sample_size,
        "guidance_scale": guidance_scale,
        "edm": asdict(edm),
    }
    # last: without it the folder cannot be opened
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
