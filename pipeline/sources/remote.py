"""Files to read, wherever they are: on this machine, in a hub repository, in a bucket, on a web server."""

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError

MOST_FILES = 1_000_000  # that braces may stand for


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
    """The sha256 of a large hub file, git's hash of a small one, a bucket's ETag, size and time of a local file."""


@dataclass(frozen=True)
class Listing:
    """Files in natural order (part-2 before part-10), none twice."""

    files: tuple[RemoteFile, ...]
    identity: dict[str, Any] = field(default_factory=dict)
    """What the listing is, for the declaration of what is made from it: equal for equal files."""


def list_files(pattern: str, what: str) -> Listing:
    """The files that a pattern stands for.

    Args:
        pattern: a local path, or the URL of a file. `*`, `?` and `[...]` stand for names within one folder, `**` for
            folders; `{0000..0099}` and `{a,b}` for all that is in the braces, each of which has to be there.
        what: the field of the config, for messages.

    Raises:
        RequestError: nothing matches, or it cannot be listed.
    """
    scheme, separator, _ = pattern.partition("://")
    if separator and scheme != "file":
        raise RequestError(f"{what} = {pattern!r}: scheme {scheme!r} is not known")
    return _list_local(pattern.removeprefix("file://"), what)


def expand_braces(pattern: str, what: str) -> list[str]:
    """Everything that a pattern with `{0000..0099}` and `{a,b}` stands for, in order; numbers keep their zeros."""
    pieces: list[Sequence[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text)
        if numbers:
            low, high = int(numbers[1]), int(numbers[2])
            if not 0 <= high - low < MOST_FILES:
                raise RequestError(
                    f"{what} = {pattern!r}: {text} is no range; expected {{first..last}} of at most {MOST_FILES}"
                )
            width = len(numbers[1]) if numbers[1].startswith("0") else 0
            pieces.append([f"{number:0{width}d}" for number in range(low, high + 1)])
        elif text.startswith("{") and "," in text:
            pieces.append(text[1:-1].split(","))
        else:
            pieces.append([text])
    count = 1
    for piece in pieces:
        count *= len(piece)
    if count > MOST_FILES:
        raise RequestError(f"{what} = {pattern!r}: it stands for {count} files; at most {MOST_FILES} are taken")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _list_local(pattern: str, what: str) -> Listing:
    """Local files; their identity are names and sizes, so that a copy on another disk is the same data set."""
    path = Path(pattern).expanduser().absolute()
    patterns = [str(path)] if path.exists() else expand_braces(str(path), what)
    found: dict[str, RemoteFile] = {}
    for each in patterns:
        root, _ = _fixed(str(path))
        paths = [Path(each)] if Path(each).exists() else [Path(p) for p in glob.iglob(each, recursive=True)]
        files = [p for p in paths if p.is_file()]
        if not files:
            if paths:
                raise RequestError(
                    f"{what} = {pattern!r}: {paths[0]} is a folder; expected files: {paths[0]}/*.tar, for example"
                )
            raise RequestError(f"{what} = {pattern!r}: no file matches {each}; check the path")
        for file in files:
            about = file.stat()
            name = file.relative_to(root).as_posix()
            found[name] = RemoteFile(name, str(file), about.st_size, f"{about.st_size}-{about.st_mtime_ns}")
    files_ = in_order(found.values())
    return Listing(files_, {"files": _digest((file.name, file.size) for file in files_)})


def in_order(files: Any) -> tuple[RemoteFile, ...]:
    """Sorted by name with numbers as numbers."""
    return tuple(sorted(files, key=lambda file: _natural(file.name)))


def _natural(name: str) -> tuple[list[Any], str]:
    parts = re.split(r"(\d+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _fixed(path: str) -> tuple[str, str]:
    """The folder that no wildcard is in, and what is below it."""
    parts = path.split("/")
    wild = next((index for index, part in enumerate(parts) if re.search(r"[*?\[{]", part)), len(parts) - 1)
    wild = min(wild, len(parts) - 1)
    return "/".join(parts[:wild]) or ("/" if path.startswith("/") else ""), "/".join(parts[wild:])


def _digest(rows: Any) -> str:
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()
