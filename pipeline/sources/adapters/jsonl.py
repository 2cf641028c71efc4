"""`jsonl`: JSON lines, or one list of objects, with pictures inside of them or beside them."""

import binascii
import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from microdit.pipeline.base.liveness import alive
from microdit.pipeline.base.secrets import without_secrets
from microdit.pipeline.config.layouts import JsonlSource
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.files.tars import ArchiveError
from microdit.pipeline.files.unpacked import unpacked
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample
from microdit.pipeline.sources.joined_fields import nested_value
from microdit.pipeline.sources.mapped_source import MappedSource
from microdit.pipeline.sources.members import is_image

MAX_LINE = MAX_BYTES * 4 // 3 + (8 << 20)
MAX_LIST = 512 << 20  # bytes of a json that is one list
LONGEST_PATH = 4096


class Jsonl(MappedSource):
    """The adapter `jsonl`. Fields: those of the options, and those of the joined tables.

    A line fails if it is no JSON object (`damaged_json`), if its picture is not there (`missing`), or is neither base64
    nor a path below the folder (`bad_value`).
    """

    adapter = "jsonl"

    def __init__(self, name: str, options: JsonlSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self.has_names = options.key is not None

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        root = self._options.root or file.url.partition("?")[0].rpartition("/")[0]
        for line, row, fault in _rows(path):
            alive()
            origin = f"line-{line}"
            if fault == "too_large":
                detail = f"the line is longer than {MAX_LINE} bytes"
                yield FileSample("", None, origin=origin, reason="too_large", detail=detail)
            elif fault.startswith("damaged: "):
                detail = fault.removeprefix("damaged: ")
                yield FileSample("", None, origin=origin, reason="damaged_archive", detail=detail)
            elif not isinstance(row, dict):
                detail = fault or f"the line is no object: {str(row)[:60]!r}"
                yield FileSample("", None, origin=origin, reason="damaged_json", detail=detail)
            else:
                yield self._sample(row, root.rstrip("/"), file, origin)

    def _sample(self, row: dict[str, Any], root: str, file: RemoteFile, origin: str) -> FileSample:
        options = self._options
        key = nested_value(row, options.key) if options.key else None
        key = key if isinstance(key, str) else "" if key is None else str(key)
        values = {option: nested_value(row, path) for option, path in options.paths().items()}
        caption, fields = self.caption_and_fields(values, file, key, key or origin, {})
        image = nested_value(row, options.image)
        if image in (None, ""):
            detail = f"{options.image!r} is empty; the line has {', '.join(map(str, row))}"[:300]
            return FileSample(key, None, caption, origin, fields, "missing", detail)
        try:
            data = self._beside(image, root) if _is_path(image) else _inside(image)
        except FileNotFoundError:
            return FileSample(
                key, None, caption, origin, fields, "missing", f"{without_secrets(root)}/{image} is not there"
            )
        except ValueError as error:
            return FileSample(key, None, caption, origin, fields, "bad_value", f"{options.image!r}: {error}")
        if len(data) > MAX_BYTES:
            detail = f"more than the {MAX_BYTES} bytes that are read"
            return FileSample(key, None, caption, origin, fields, "too_large", detail)
        return FileSample(key, data, caption, origin, fields)

    def _beside(self, image: str, root: str) -> bytes:
        """Read the picture at a path below the folder, one byte more than the most at most.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: the path leads out of the folder.
        """
        relative = PurePosixPath(image)
        if relative.is_absolute() or ".." in relative.parts or "\0" in image or "://" in image:
            raise ValueError(f"expected a path below the folder, found {image[:120]!r}")
        name = relative.as_posix()
        address = f"{root}/{quote(name) if root.startswith(('http://', 'https://')) else name}"
        with local_copy(RemoteFile(name, address), self._scratch) as path, path.open("rb") as file:
            return file.read(MAX_BYTES + 1)


def _is_path(image: object) -> bool:
    return isinstance(image, str) and len(image) <= LONGEST_PATH and is_image(image) and not image.startswith("data:")


def _inside(image: object) -> bytes:
    """Decode base64, or a `data:` URL of it.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(image, str):
        raise ValueError(f"expected base64 or a path, found {type(image).__name__}")
    text = image.partition(",")[2] if image.startswith("data:") else image
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"expected base64 or the path of a picture, found {image[:60]!r} ({error})") from None


def _rows(path: Path) -> Iterator[tuple[int, Any, str]]:
    """Yield the number of each line that is not blank, its value, and what is wrong with it, if anything."""
    number = 0
    with unpacked(path) as file:
        try:
            if file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                yield from _list_rows(file.read(MAX_LIST + 1))
                return
            while line := file.readline(MAX_LINE):
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        alive()
                        line = file.readline(MAX_LINE)
                    yield number, None, "too_large"
                elif line.strip():
                    yield (number, *_parse(line.removeprefix(b"\xef\xbb\xbf")))
                number += 1
        except ArchiveError as error:
            yield number, None, f"damaged: nothing can be read behind line {number}: {error}"


def _list_rows(data: bytes) -> Iterator[tuple[int, Any, str]]:
    if len(data) > MAX_LIST:
        yield 0, None, f"damaged: a list of more than {MAX_LIST} bytes; expected JSON lines for so many"
        return
    rows, fault = _parse(data)
    if not isinstance(rows, list):
        yield 0, None, f"damaged: {fault or 'expected a list of objects'}"
        return
    for number, row in enumerate(rows):
        yield number, row, ""


def _parse(data: bytes) -> tuple[Any, str]:
    try:
        return json.loads(data), ""
    except (ValueError, RecursionError) as error:
        return None, f"it cannot be read as JSON: {error}"
