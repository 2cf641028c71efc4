"""Identify the models of a stage: names, revisions and hashes for its fingerprint."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from microdit.pipeline.base.errors import RequestError


@lru_cache(maxsize=16)
def autoencoder_identity(column: str, name: str, revision: str | None) -> dict[str, Any]:
    """Identify the autoencoder of a column: repository and commit, or folder and hash; dtype and normaliser.

    Raises:
        RequestError: there is no such model, or its files cannot be had.
    """
    from microdit.model.pretrained.autoencoder import autoencoder_fingerprint

    return _identity(f"columns.{column}.autoencoder = {name!r}", autoencoder_fingerprint, name, revision)


@lru_cache(maxsize=16)
def text_encoder_identity(column: str, name: str, revision: str | None, trim: bool = False) -> dict[str, Any]:
    """Identify the text encoder of a column, as `autoencoder_identity` does; and the number of tokens that it keeps."""
    from microdit.model.pretrained.text import text_encoder_fingerprint

    return _identity(f"columns.{column}.encoder = {name!r}", text_encoder_fingerprint, name, revision, trim=trim)


@lru_cache(maxsize=16)
def captioner_identity(column: str, name: str, revision: str | None) -> dict[str, Any]:
    """Identify the captioner of a column, as `autoencoder_identity` does; and its family."""
    from microdit.model.pretrained.captioners import captioner_fingerprint

    return _identity(f"columns.{column}.vlm = {name!r}", captioner_fingerprint, name, revision)


@lru_cache(maxsize=16)
def tagger_identity(column: str, name: str) -> dict[str, Any]:
    """Identify the tagger of a column: its name and hash.

    Raises:
        RequestError: there is no such tagger.
    """
    from microdit.model.pretrained.tagger import tagger_fingerprint

    try:
        return tagger_fingerprint(name)
    except ValueError as error:
        raise RequestError(f"columns.{column}.tags = {name!r}: {error}") from error


@lru_cache(maxsize=16)
def vision_identity(column: str, task: Any, name: str, label: str | None, revision: str | None) -> dict[str, Any]:
    """Identify the vision model of a column, as `autoencoder_identity` does."""
    from microdit.model.pretrained.vision import vision_fingerprint

    field = f"columns.{column}.model = {name!r}"
    return _identity(field, vision_fingerprint, name, revision, task=task, label=label)


def carried_identity(column: str, name: str) -> dict[str, Any]:
    """Identify a model that comes in a package (`microdit.model.pretrained.packaged`).

    Raises:
        RequestError: the package is missing.
    """
    from microdit.model.pretrained.hub import ModelFilesError
    from microdit.model.pretrained.packaged import package_fingerprint

    try:
        return package_fingerprint(name)
    except ModelFilesError as error:
        raise RequestError(f"columns.{column}: {error}") from error


def _identity(
    field: str, fingerprint: Callable[..., Any], name: str, revision: str | None, **options: Any
) -> dict[str, Any]:
    from microdit.model.pretrained.hub import ModelFilesError

    try:
        return fingerprint(name, revision=revision, **options)
    except (ModelFilesError, ValueError) as error:
        raise RequestError(f"{field}: {error}") from error


def absolute(name: str) -> str:
    """Absolute path if `name` is a local folder, else `name` unchanged (a hub id)."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name
