"""`urls`: a list of `url<TAB>caption` lines without a header, as CC12M is published. A line is an input."""

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import FetchOptions
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import unit_name
from microdit.pipeline.sources.source import Input
from microdit.pipeline.sources.url_fetcher import fetch_all

MAX_LINE = 64 << 10
BLOCK = 8 << 20


@dataclass(frozen=True)
class ListIndex:
    """The offsets of a list's units, from one pass over the file, so that a unit is read without the rest."""

    sha256: str
    """Hash of the lines within the limit."""
    inputs: int
    offsets: tuple[int, ...]
    """Offsets of the first byte of each unit, and of the end of the last one."""


def index_list(path: Path, unit_inputs: int, limit: int | None = None) -> ListIndex:
    """Find the units of a list; cached as long as the file is unchanged.

    Raises:
        OSError: the file cannot be read.
    """
    stat = path.stat()
    return _index_list(path, unit_inputs, limit, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _index_list(path: Path, unit_inputs: int, limit: int | None, modified: int, size: int) -> ListIndex:
    digest, inputs, end = hashlib.sha256(), 0, 0
    offsets = [0]
    with path.open("rb") as file:
        while (limit is None or inputs < limit) and (block := file.read(BLOCK)):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
            if limit is not None and inputs + len(ends) >= limit:
                ends = ends[: limit - inputs]
                block = block[: ends[-1]]
            offsets += (end + ends[(-inputs - 1) % unit_inputs :: unit_inputs]).tolist()
            inputs += len(ends)
            digest.update(block)
            end += len(block)
            inside = len(ends) == 0 or ends[-1] < len(block)
    if end and inside:  # a last line without an end
        inputs += 1
    if offsets[-1] != end:
        offsets.append(end)
    return ListIndex(digest.hexdigest(), inputs, tuple(offsets))


class Urls:
    """The adapter `urls`.

    Args:
        path: the list.
        base: URL that relative URLs of the list are relative to; the origin of an input is as the list has it.

    Raises:
        RequestError: the list is absent or empty.
    """

    def __init__(
        self,
        name: str,
        path: str | Path,
        unit_inputs: int,
        fetch: FetchOptions,
        limit: int | None = None,
        license: str = "",
        base: str | None = None,
    ):
        self.name, self.base = name, base
        self.terms = license or "each image under its own owner's terms"
        self._path = Path(path).expanduser().absolute()
        self._unit_inputs, self._license, self._fetch = unit_inputs, license, fetch
        try:
            self._index = index_list(self._path, unit_inputs, limit)
        except OSError as error:
            raise RequestError(
                f"sources.{name}.list = {str(path)!r}: it cannot be read ({error.strerror}); "
                "expected a file of url<TAB>caption lines"
            ) from None
        if self._index.inputs == 0:
            raise RequestError(f"sources.{name}.list = {str(path)!r}: it is empty; expected url<TAB>caption lines")

    def stage(self) -> dict[str, Any]:
        return {
            "adapter": "urls",
            "version": 1,
            "list": self._index.sha256,
            "inputs": self._index.inputs,
            "units": len(self._index.offsets) - 1,
            "unit_inputs": self._unit_inputs,
            "license": self._license,
            "max_bytes": self._fetch.max_bytes,
        }

    def units(self) -> list[str]:
        return [unit_name(self.name, number) for number in range(len(self._index.offsets) - 1)]

    def running(self, corpus: Corpus, report: Callable[[str], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        for item, fetched in fetch_all(self._requests(unit, wanted), self._fetch):
            if fetched is None:
                yield item
            else:
                yield replace(item, data=fetched.data, reason=fetched.reason, detail=fetched.detail)

    def _requests(self, unit: str, wanted: Callable[[int], bool]) -> Iterator[tuple[Input, str | None]]:
        """List the unit's inputs without their bytes, and the URLs to fetch them from."""
        number = self.units().index(unit)
        for ordinal, line in enumerate(self._lines(number)):
            key = f"{number * self._unit_inputs + ordinal:09d}"
            try:
                origin, caption = parse_line(line)
                url = urljoin(self.base, origin) if self.base else origin
                if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                    raise ValueError(f"expected an http:// or https:// URL, found {origin[:80]!r}")
            except ValueError as error:
                yield Input(ordinal, key, None, reason="unreadable_list_line", detail=str(error)), None
                continue
            item = Input(ordinal, key, None, origin, caption, self._license)
            yield item, url if wanted(ordinal) else None

    def _lines(self, number: int) -> Iterator[bytes]:
        """Read the lines of a unit without their line ends; of one longer than `MAX_LINE`, a byte more than that."""
        start, end = self._index.offsets[number : number + 2]
        with self._path.open("rb") as file:
            file.seek(start)
            while file.tell() < end:
                line = part = file.readline(MAX_LINE + 2)
                while part and not part.endswith(b"\n"):
                    part = file.readline(MAX_LINE)
                yield line.rstrip(b"\r\n") if len(line) <= MAX_LINE else line[: MAX_LINE + 1]


def parse_line(line: bytes) -> tuple[str, str]:
    """Parse the URL and the caption of a list's line.

    Raises:
        ValueError: the line is malformed; the message says how.
    """
    if len(line) > MAX_LINE:
        raise ValueError(f"the line is longer than {MAX_LINE} bytes")
    text = line.decode("utf-8")
    url, tab, caption = text.partition("\t")
    if not tab or not url.strip():
        raise ValueError(f"expected url<TAB>caption, found {text[:80]!r}")
    return url.strip(), " ".join(caption.split())
