"""`urls`: a list of rows with a URL and a caption each, as CC12M and CC3M are published. A row is an input."""

import hashlib
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import numpy as np

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.secrets import has_secrets, without_secrets
from microdit.pipeline.config.sources import FetchOptions, Img2datasetOptions
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import unit_name
from microdit.pipeline.corpus.redeclare import is_unused_source
from microdit.pipeline.files.scratch import scratch_folder
from microdit.pipeline.sources.failing_hosts import committed_shards, failing_hosts
from microdit.pipeline.sources.img2dataset_engine import check_img2dataset, fetch_by_img2dataset
from microdit.pipeline.sources.joined_fields import as_text, fields_of
from microdit.pipeline.sources.list_columns import ListColumns
from microdit.pipeline.sources.list_format import PLAIN, SAMPLE, ListFormat, find_format
from microdit.pipeline.sources.list_json import JsonFormat
from microdit.pipeline.sources.list_records import MAX_LINE, read_records, records
from microdit.pipeline.sources.list_text import ListText
from microdit.pipeline.sources.members import fault_fields
from microdit.pipeline.sources.source import Input
from microdit.pipeline.sources.url_fetcher import Fetched, fetch_all

BLOCK = 8 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class ListIndex:
    """The offsets of a list's units, from one pass over the file, so that a unit is read without the rest."""

    sha256: str
    """Hash of the lines within the limit."""
    inputs: int
    offsets: tuple[int, ...]
    """Offsets of the first byte of each unit, and of the end of the last one."""


def index_list(
    path: Path,
    unit_inputs: int,
    limit: int | None = None,
    form: ListFormat | JsonFormat = PLAIN,
) -> ListIndex:
    """Find the units of a list; cached as long as the file is unchanged.

    Raises:
        OSError: the file cannot be read.
    """
    stat = path.stat()
    return _index_list(path, unit_inputs, limit, form, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _index_list(
    path: Path, unit_inputs: int, limit: int | None, form: ListFormat | JsonFormat, modified: int, size: int
) -> ListIndex:
    if isinstance(form, ListFormat) and form.quoted:
        return _index_records(path, unit_inputs, limit, form)
    kind = np.dtype({"utf-8": "u1", "utf-16-le": "<u2", "utf-16-be": ">u2"}[form.encoding])
    digest, inputs, end = hashlib.sha256(), 0, form.start
    offsets = [form.start]
    with path.open("rb") as file:
        file.seek(form.start)
        while (limit is None or inputs < limit) and (block := file.read(BLOCK * kind.itemsize)):
            characters = np.frombuffer(block, kind, len(block) // kind.itemsize)
            ends = (np.flatnonzero(characters == ord("\n")) + 1) * kind.itemsize
            if limit is not None and inputs + len(ends) >= limit:
                ends = ends[: limit - inputs]
                block = block[: ends[-1]]
            offsets += (end + ends[(-inputs - 1) % unit_inputs :: unit_inputs]).tolist()
            inputs += len(ends)
            digest.update(block)
            end += len(block)
            inside = len(ends) == 0 or ends[-1] < len(block)
    if end > form.start and inside:  # a last line without an end
        inputs += 1
    if offsets[-1] != end:
        offsets.append(end)
    return ListIndex(digest.hexdigest(), inputs, tuple(offsets))


def _index_records(path: Path, unit_inputs: int, limit: int | None, form: ListFormat) -> ListIndex:
    """Find the units of a list whose cells may have line breaks."""
    offsets, inputs, end = [form.start], 0, form.start
    with path.open("rb") as file:
        file.seek(form.start)
        for size, _ in islice(records(file, form.encoding, form.delimiter), limit):
            if inputs and inputs % unit_inputs == 0:
                offsets.append(end)
            inputs += 1
            end += size
        digest = hashlib.sha256()
        file.seek(form.start)
        for at in range(form.start, end, BLOCK):
            digest.update(file.read(min(BLOCK, end - at)))
    return ListIndex(digest.hexdigest(), inputs, tuple([*offsets, end] if inputs else offsets))


def read_lines(path: Path, index: ListIndex, number: int, longest: int = MAX_LINE) -> Iterator[bytes]:
    """Read the lines of a unit without their line ends; of one longer than `longest`, a byte more than that."""
    start, end = index.offsets[number : number + 2]
    with path.open("rb") as file:
        file.seek(start)
        while file.tell() < end:
            line = part = file.readline(longest + 2)
            while part and not part.endswith(b"\n"):
                part = file.readline(longest)
            yield line.rstrip(b"\r\n") if len(line) <= longest else line[: longest + 1]


def decode_lines(path: Path, index: ListIndex, number: int, count: int, encoding: str) -> Iterator[bytes]:
    """Read `count` lines of a unit in another encoding, as `read_lines` does, and encode them as UTF-8."""
    with path.open("rb") as file:
        file.seek(index.offsets[number])
        text = TextIOWrapper(file, encoding, "replace", newline="\n")
        for _ in range(count):
            line = part = text.readline(MAX_LINE + 2)
            while part and not part.endswith("\n"):
                part = text.readline(MAX_LINE)
            yield line.rstrip("\r\n").encode()[: MAX_LINE + 1]


class Urls:
    """The adapter `urls`.

    Args:
        path: the list, or a pattern of its files.
        columns: the columns of the list that are asked for.
        scratch: folder for the copy of a list that is not one plain file of this machine.
        img2dataset: how it is run, if it fetches.
        base: URL that relative URLs of the list are relative to; the origin of an input is as the list has it.

    Raises:
        RequestError: the list is absent, empty, or no list of URLs and captions.
    """

    fetches_rows = True

    def __init__(
        self,
        name: str,
        path: str | Path,
        unit_inputs: int,
        fetch: FetchOptions,
        limit: int | None = None,
        license: str = "",
        base: str | None = None,
        columns: ListColumns | None = None,
        scratch: Path | None = None,
        img2dataset: Img2datasetOptions | None = None,
    ):
        self.name, self.base = name, base
        self.terms = license or "each image under its own owner's terms"
        self._unit_inputs, self._license, self._fetch = unit_inputs, license, fetch
        self._img2dataset, self._scratch = img2dataset, scratch or scratch_folder(None)
        self._where = f"sources.{name}.list = {without_secrets(str(path))!r}"
        self._format: ListFormat | JsonFormat = PLAIN
        try:
            self._text = ListText.find(path, self._where, self._scratch, limit)
            text = self._text.path()
            with text.open("rb") as file:
                head = file.read(SAMPLE)
            self._secrets = has_secrets(head.decode("latin-1").replace("\0", ""))
            if head and base is None:
                self._format = find_format(head, text.stat().st_size <= SAMPLE, limit, columns)
            self._index = index_list(text, unit_inputs, limit, self._format)
        except OSError as error:
            raise RequestError(
                f"{self._where}: it cannot be read ({error.strerror or error}); "
                "expected a file of url<TAB>caption lines"
            ) from None
        except RequestError:
            raise
        except ValueError as error:
            raise RequestError(f"{self._where}: {error}") from None
        if self._index.inputs == 0:
            raise RequestError(f"{self._where}: it is empty; expected url<TAB>caption lines")

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
            **self._format.stage(),
        }

    def units(self) -> list[str]:
        return [unit_name(self.name, number) for number in range(len(self._index.offsets) - 1)]

    def keep_to_known_files(self, corpus: Corpus, grow: bool, report: Callable[[str], None]) -> None:
        """Keep to the lines that the corpus knows; those that were added behind them are left out.

        Raises:
            RequestError: it is another list, of which something is committed; a list cannot grow.
        """
        if self.name not in corpus.sources() or is_unused_source(corpus, self.name):
            return
        declared = corpus.source(self.name).made_by
        if declared.get("adapter") != "urls" or declared.get("unit_inputs") != self._unit_inputs:
            return  # `declare` says what differs
        inputs, what = int(declared["inputs"]), self._where
        index = index_list(self._text.at_least(inputs, what).path(), self._unit_inputs, inputs, self._format)
        if index.sha256 != declared["list"]:
            raise RequestError(
                f"{what}: it is another list than that of {inputs:,} inputs which the corpus was made from; put that "
                "one back, or give the source a new name"
            )
        added = self._index.inputs - inputs
        if added > 0 and grow:
            raise RequestError(
                f"{what}: {added:,} lines were added; a list does not grow: move them into one of their own, as "
                "another source, or build without --grow"
            )
        if added > 0:
            report(f"source {self.name}: {added:,} lines were added to its list, and are left out")
            self._index = index

    @contextmanager
    def running(self, corpus: Corpus, report: Callable[[str], None]) -> Iterator[None]:
        if self._img2dataset is not None:
            check_img2dataset(f"sources.{self.name}.fetcher", self._img2dataset)
        if self.base is None and not re.search(r"@|://", self._fetch.agent):
            report(
                f"source {self.name}: sources.{self.name}.fetch.contact=ADDRESS tells servers your mail address or "
                "page; some refuse requests without one"
            )
        if self._secrets:
            report(
                f"source {self.name}: URLs of its list have passwords or signatures, which are sent, and left out of "
                "all that is kept"
            )
        if self.base is not None:
            yield
            return
        before = committed_shards(corpus, self.name).items()
        yield
        if text := failing_hosts(corpus, self.name, before):
            report(text)

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        for (item, checksums), fetched in self._fetched(self._requests(unit, wanted)):
            if fetched is None:
                yield item
            else:
                final = without_secrets(fetched.url)
                moved = self.base is None and final not in ("", item.origin)
                fields = dict(item.fields)
                if moved:
                    fields["final_url"] = final  # placeholders share it: "photo removed"
                if fetched.unverified:
                    fields["unverified_certificate"] = fetched.unverified
                wrong = _wrong_checksum(fetched.data, checksums) if fetched.data is not None else None
                if wrong is not None:
                    yield replace(item, data=None, reason="wrong_checksum", detail=wrong, fields=fields)
                    continue
                yield replace(item, data=fetched.data, reason=fetched.reason, detail=fetched.detail, fields=fields)

    def _fetched(self, requests: Iterator[tuple[T, str | None]]) -> Generator[tuple[T, Fetched | None]]:
        if self._img2dataset is not None:
            return fetch_by_img2dataset(requests, self._fetch, self._img2dataset, self._scratch)
        return fetch_all(requests, self._fetch)

    def _requests(
        self, unit: str, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[tuple[Input, Sequence[tuple[str, str]]], str | None]]:
        """List the unit's inputs without their bytes, with their checksums, and the URLs to fetch them from."""
        number = self.units().index(unit)
        for ordinal, line in enumerate(self._lines(number)):
            key = f"{number * self._unit_inputs + ordinal:09d}"
            try:
                row = self._format.parse(line)
                checksums = row.checksums()
                url = urljoin(self.base, row.url) if self.base else row.url
                origin = without_secrets(row.url)
                if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                    raise ValueError(f"expected an http:// or https:// URL, found {origin[:80]!r}")
            except ValueError as error:
                yield (Input(ordinal, key, None, reason="unreadable_list_line", detail=str(error)), ()), None
                continue
            faults: dict[str, str] = {}
            caption = as_text(row.caption, faults)
            fields = fields_of(row.fields(), faults)
            item = Input(ordinal, key, None, origin, caption, self._license, {**fields, **fault_fields(faults)})
            yield (item, checksums), url if wanted(ordinal) else None

    def _lines(self, number: int) -> Iterator[bytes]:
        form, path = self._format, self._text.path()
        count = min(self._unit_inputs, self._index.inputs - number * self._unit_inputs)
        if isinstance(form, ListFormat) and form.quoted:
            with path.open("rb") as file:
                file.seek(self._index.offsets[number])
                yield from read_records(file, form.encoding, form.delimiter, count)
        elif form.encoding == "utf-8":
            yield from read_lines(path, self._index, number, form.longest)
        else:
            yield from decode_lines(path, self._index, number, count, form.encoding)


def _wrong_checksum(data: bytes, checksums: Sequence[tuple[str, str]]) -> str | None:
    """Return how the bytes differ from the list's checksums; None if they do not."""
    for name, expected in checksums:
        found = hashlib.new(name, data, usedforsecurity=False).hexdigest()
        if found != expected:
            return f"the {name} of the {len(data)} bytes that came is {found}, the list has {expected}"
    return None
