"""A file somewhere else: its name, its size and its version."""

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
    """Its path below the root that was listed; stable, which a URL need not be."""
    url: str
    """A local path, `https://...`, `s3://bucket/key`, or `hf://datasets/OWNER/NAME@COMMIT/PATH`."""
    size: int | None = None
    """Bytes; None if it is not known before the file is asked for."""
    etag: str = ""
    """Says which bytes they are: the sha256 of a large hub file, git's hash of a small one, a bucket's ETag, size and
    time of a local file."""


@dataclass(frozen=True)
class Listing:
    """Files in natural order (part-2 before part-10), none twice."""

    files: tuple[RemoteFile, ...]
    identity: dict[str, Any] = field(default_factory=dict)
    """What the files are, for the declaration of what is made from them. Of local files names and sizes, so that a
    copy on another disk is the same; of a web server's the names, as it is not asked for more."""


def listing(files: Iterable[RemoteFile], identity: dict[str, Any]) -> Listing:
    """The files in order, with that identity."""
    return Listing(tuple(sorted(files, key=lambda file: natural(file.name))), identity)


def digest(rows: Iterable[tuple[Any, ...]]) -> str:
    """One hash over what is known of some files."""
    text = json.dumps(sorted(rows, key=lambda row: natural(row[0])), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
