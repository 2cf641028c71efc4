"""Sources whose units are files: tars, zips, parquet tables. What they share; an adapter adds what is in a file."""

import hashlib
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import unit_name
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.source import Fields, Input

if TYPE_CHECKING:
    from microdit.pipeline.config.sources import FileOptions
    from microdit.pipeline.tables.joins.lookup import Joined
    from microdit.pipeline.tables.joins.spec import JoinSpec


MAX_BYTES = 64 << 20
"""Of one image, or of one text beside it; more fails with `too_large`."""


LONGEST_KEY = 80
NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class Sample:
    """What an adapter finds in a file, in order: an input without its number."""

    key: str
    """Any text, as the dataset has it; "" to be named by its place: file and number."""
    data: bytes | None
    """The image; None with a `reason`, or if it was not wanted."""
    caption: str = ""
    origin: str = ""
    """The member or row; the dataset and the file are put before it. A whole URL stays as it is."""
    fields: Fields = field(default_factory=dict)
    reason: str | None = None
    detail: str = ""


class FileSource:
    """Base of the adapters of files. A file is a unit; its name has the file's number in the whole listing.

    An adapter gives `listing` and `samples`; where they are needed `details` and `tables`.

    Args:
        scratch: folder for files that are being downloaded.
    """

    adapter: ClassVar[str]
    version: ClassVar[int] = 1
    """To be raised when the same files give other samples."""

    def __init__(self, name: str, options: "FileOptions", scratch: Path):
        self.name, self._file_options, self._scratch = name, options, scratch
        self.license: str = options.license
        self.terms: str = options.license or "no licence is stated: see the dataset's own terms"
        self._joined: list[Joined] | None = None

    # -- what an adapter gives -----------------------------------------------------------------------------------------

    def listing(self) -> Listing:
        """All files, whatever `units` says; the identity tells which these are.

        Raises:
            RequestError: it cannot be had, and why.
        """
        raise NotImplementedError

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[Sample]:
        """The samples of one file, which is at `path`, in an order that is always the same; nothing of it in memory.

        A broken place is a last sample with the reason `damaged_archive`, never an exception.
        """
        raise NotImplementedError

    def details(self) -> dict[str, Any]:
        """What else the samples depend on, for the declaration."""
        return {}

    def tables(self) -> "Sequence[JoinSpec]":
        """Tables to look samples up in: `self.table(i)` within `samples`."""
        return ()

    @property
    def dataset(self) -> str:
        """What an origin begins with: the hub's name of the dataset, or the source's."""
        return str(self._listing.identity.get("repo", self.name))

    # -- what it gets --------------------------------------------------------------------------------------------------

    def table(self, number: int) -> "Joined":
        """The table of `tables()[number]`.

        Raises:
            RuntimeError: the source is read outside of its `running`.
        """
        if self._joined is None:
            raise RuntimeError(f"source {self.name} is read outside of its running(): its tables are not there")
        return self._joined[number]

    def stage(self) -> dict[str, Any]:
        stage = {
            "adapter": self.adapter,
            "version": self.version,
            "files": self._listing.identity,
            "license": self.license,
            "max_bytes": MAX_BYTES,
            **self.details(),
        }
        if tables := self.tables():
            stage["tables"] = [
                {"files": spec.listing.identity, "key": spec.key, "fields": dict(spec.fields)} for spec in tables
            ]
        options = self._file_options
        if options.limit is not None:  # how much of a file is read depends on how many there are
            stage |= {"limit": options.limit, "units": options.units, "shuffle": options.shuffle}
        return stage

    def units(self) -> list[str]:
        return [unit_name(self.name, number) for number in self._shares]

    @contextmanager
    def running(self, corpus: Corpus, say: Callable[[str], None]) -> Iterator[None]:
        if tables := self.tables():
            from microdit.pipeline.tables.joins.build import build
            from microdit.pipeline.tables.joins.lookup import Joined

            for spec in tables:
                build(corpus, spec, self._scratch, say)
            self._joined = [Joined(corpus.store, spec) for spec in tables]
        try:
            yield
        finally:
            self._joined = None

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        number = int(unit.rpartition("-")[2])
        file, share = self._listing.files[number], self._shares.get(number)
        before = f"{self.dataset}/{file.name}/"
        keys = _Keys(number)
        with local_copy(file, self._scratch) as path, closing(_generator(self.samples(path, file, number))) as found:
            for ordinal, sample in enumerate(islice(found, share)):
                alive()
                key, again = keys.next(sample.key, ordinal)
                origin = sample.origin if "://" in sample.origin else before + sample.origin
                about = (origin, sample.caption, self.license, sample.fields)
                if again and sample.reason is None:
                    detail = f"{sample.key!r} is there a second time in {file.name}"
                    yield Input(ordinal, key, None, *about, reason="duplicate_key", detail=detail)
                else:
                    data = sample.data if wanted(ordinal) else None
                    yield Input(ordinal, key, data, *about, reason=sample.reason, detail=sample.detail)

    # -- which files ---------------------------------------------------------------------------------------------------

    @cached_property
    def _listing(self) -> Listing:
        return self.listing()

    @cached_property
    def _shares(self) -> dict[int, int | None]:
        """The numbers of the files to read, in order, and how many samples of each."""
        numbers = self._chosen()
        if (limit := self._file_options.limit) is None:
            return dict.fromkeys(numbers)
        each, more = divmod(limit, len(numbers))
        return {number: each + (i < more) for i, number in enumerate(numbers) if each + (i < more)}

    def _chosen(self) -> list[int]:
        """The numbers of the files that `units` and `shuffle` leave, in their order."""
        files, options = self._listing.files, self._file_options
        numbers = list(range(len(files)))
        if (seed := options.shuffle) is not None:  # a file's place does not depend on how many others there are
            numbers.sort(key=lambda n: hashlib.sha256(f"{seed}/{files[n].name}".encode()).digest())
        if isinstance(options.units, int):
            return numbers[: options.units]
        if options.units is not None:
            by_name = {file.name: n for n, file in enumerate(files)}
            for name in options.units:
                if name not in by_name:
                    some = ", ".join(list(by_name)[:3])
                    raise RequestError(
                        f"sources.{self.name}.units: there is no file {name!r}; "
                        f"expected names of the {len(files)} files, such as {some}"
                    )
            chosen = {by_name[name] for name in options.units}
            return [n for n in numbers if n in chosen]
        return numbers


class _Keys:
    """The keys of one unit: those of the dataset made fit for a corpus, and none of them twice."""

    def __init__(self, number: int):
        self._number = number
        self._raw_of: dict[str, bytes] = {}

    def next(self, raw: str, ordinal: int) -> tuple[str, bool]:
        """The key of the next sample, and whether its own key was there before."""
        place = f"{self._number:06d}-{ordinal:06d}"
        whole = raw or place
        digest = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = NOT_IN_KEYS.sub("_", whole)
        if len(key) > LONGEST_KEY:
            key = self._apart(key, digest.hex())
        if self._raw_of.get(key, digest) != digest:  # another name that became the same
            key = self._apart(key, digest.hex())
        again = key in self._raw_of
        while key in self._raw_of:
            key = self._apart(key, place)
            place += "_"
        self._raw_of[key] = digest
        return key, again

    @staticmethod
    def _apart(key: str, end: str) -> str:
        return f"{key[: LONGEST_KEY - 1 - len(end)]}-{end}"


def _generator(samples: Iterator[Sample]) -> Generator[Sample]:
    """As something that can be closed, whatever the adapter made it of."""
    yield from samples
