"""What identifies a model's numbers, told from its files: no weights are loaded, the hub is asked for a config only."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError


@lru_cache(maxsize=16)
def autoencoder_identity(column: str, name: str, revision: str | None) -> dict[str, Any]:
    """Repository and commit, or a folder's name and hash, of an autoencoder that `column` asks for; dtype, normaliser.

    Raises:
        RequestError: there is no such model, or its files cannot be had.
    """
    from model.autoencoder import autoencoder_fingerprint

    return _identity(f"columns.{column}.autoencoder = {name!r}", autoencoder_fingerprint, name, revision)


@lru_cache(maxsize=16)
def text_encoder_identity(column: str, name: str, revision: str | None) -> dict[str, Any]:
    """The same for a text encoder; and how many tokens it keeps."""
    from model.text import text_encoder_fingerprint

    return _identity(f"columns.{column}.encoder = {name!r}", text_encoder_fingerprint, name, revision)


def _identity(field: str, fingerprint: Callable[..., Any], name: str, revision: str | None) -> dict[str, Any]:
    from model.hub import ModelFilesError

    try:
        return fingerprint(name, revision=revision)
    except (ModelFilesError, ValueError) as error:
        raise RequestError(f"{field}: {error}") from error


def absolute(name: str) -> str:
    """A folder's name as any process can open it; another name as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def best_device() -> str:
    """`cuda` if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
