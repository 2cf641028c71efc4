"""What identifies a model's numbers, told from its files: no weights are loaded, the hub is asked for a config only."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError


@lru_cache(maxsize=16)
def autoencoder_identity(column: str, name: str, revision: str | None) -> dict[str, Any]:
    """Repository and commit, or a folder's name and hash, of an autoencoder that `column` asks for; and its dtype.

    Raises:
        RequestError: there is no such model, or its files cannot be had.
    """
    from model.autoencoder import AUTOENCODERS, Entry

    entry = AUTOENCODERS.get(name)
    if entry is None:
        where, _, subfolder = (name, "", "") if Path(name).is_dir() else name.partition(":")
        entry = Entry(where, subfolder)
    prefix = f"{entry.subfolder}/" if entry.subfolder else ""
    patterns = (f"{prefix}config.json", f"{prefix}*.safetensors")
    origin = _origin(f"columns.{column}.autoencoder", name, entry.where, patterns, revision)
    return {**origin, "dtype": str(entry.dtype).removeprefix("torch.")}


@lru_cache(maxsize=16)
def text_encoder_identity(column: str, name: str, revision: str | None) -> dict[str, Any]:
    """The same for a text encoder; and how many tokens it keeps."""
    from model.text import TEXT_ENCODERS, TOKENIZER, WEIGHTS, Entry

    entry = TEXT_ENCODERS.get(name) or Entry(name, 128)
    where = entry.where if isinstance(entry.where, str) else str(entry.where())
    origin = _origin(f"columns.{column}.encoder", name, where, ("config.json", *WEIGHTS, *TOKENIZER), revision)
    return {**origin, "dtype": str(entry.dtype).removeprefix("torch."), "max_tokens": entry.max_tokens}


def _origin(field: str, name: str, where: str, patterns: tuple[str, ...], revision: str | None) -> dict[str, str]:
    from model.hub import ModelFilesError, fetch

    try:
        files = fetch(where, patterns[:1], revision=revision)
    except (ModelFilesError, ValueError) as error:
        raise RequestError(f"{field} = {name!r}: {error}") from error
    if not (files.folder / patterns[0]).is_file():
        raise RequestError(f"{field} = {name!r}: there is no {patterns[0]} in {where}; expected a model's folder")
    return files.origin(*patterns)


def absolute(name: str) -> str:
    """A folder's name as any process can open it; another name as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def best_device() -> str:
    """`cuda` if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
