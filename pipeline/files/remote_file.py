"""Describe files of a data set, here or elsewhere: name, address, size and version."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from microdit.pipeline.files.patterns import natural


@dataclass(frozen=True)
class RemoteFile:
    """One file of a listing."""

    name: str
    """The path below the listed root; stable, which a URL need not be."""
    url: str
    """A local path, `https://...`, `s3://bucket/key`, or `hf://datasets/OWNER/NAME@COMMIT/PATH`."""
    size: int | None = None
    """Bytes; None if it is unknown before the file is requested."""
    etag: str = ""
    """The version of the bytes: the sha256 of a large hub file, git's hash of a small one, a bucket's ETag, size and
    time of a local file."""
    parts: "tuple[RemoteFile, ...]" = ()
    """The files that it was split into, in their order; it is their bytes, one after the other."""


@dataclass(frozen=True)
class Listing:
    """Files in natural order (part-2 before part-10), without duplicates."""

    files: tuple[RemoteFile, ...]
    identity: dict[str, Any] = field(default_factory=dict)
    """The files as the declaration of a source states them. Of local files the names and sizes, so that a copy on
    another disk is the same; for web servers the names only: no request is made."""


def listing(files: Iterable[RemoteFile], identity: dict[str, Any]) -> Listing:
    """Sort the files and attach the identity."""
    return Listing(tuple(sorted(files, key=lambda file: natural(file.name))), identity)


def digest(rows: Iterable[tuple[Any, ...]]) -> str:
    """Hash rows of a name and further values of files, in any order."""
    text = json.dumps(sorted(rows, key=lambda row: natural(row[0])), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
