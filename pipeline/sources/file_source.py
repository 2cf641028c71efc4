"""The base of the sources whose units are files (tars, zips, parquet tables): choice of files, keys, join tables."""

import hashlib
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.config.files import FileOptions
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import unit_name
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.files.wrong_files import what_it_is
from microdit.pipeline.sources.known_files import declared_revisions, kept_to, newest, note
from microdit.pipeline.sources.source import Fields, Input
from microdit.pipeline.tables.joins.build import build
from microdit.pipeline.tables.joins.lookup import Joined
from microdit.pipeline.tables.joins.spec import JoinSpec

MAX_BYTES = 64 << 20
"""Of one image, or of one text beside it; a larger one fails with `too_large`."""

LONGEST_KEY = 80
COMPARED = 64  # files whose first names are compared
NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True)
class FileSample:
    """One sample of a file, as an adapter reads it: an input without its ordinal."""

    key: str
    """Any text, as the dataset has it; "" to be named by the numbers of the file and the sample."""
    data: bytes | None
    """The image; None with a `reason`, or if it was not wanted."""
    caption: str = ""
    origin: str = ""
    """The member or row; the dataset and the file are put before it, except before a whole URL."""
    fields: Fields = field(default_factory=dict)
    reason: str | None = None
    detail: str = ""


class FileSource:
    """Base of the adapters of files. A file is a unit, whose name has the file's number in the whole listing.

    An adapter implements `listing` and `samples`, and `details` and `tables` if need be.

    Args:
        scratch: folder for files that are being downloaded.
    """

    adapter: ClassVar[str]
    version: ClassVar[int] = 1
    """Raise it when the same files give other samples."""
    text_options: ClassVar[frozenset[str]] = frozenset()
    """The keys of `stage()` that say where texts come from, and change no input: they can be corrected."""
    fixed_options: ClassVar[Mapping[str, str]] = {}
    """Keys of `stage()` that look like those and cannot be corrected: why, and what to do instead."""
    has_names: bool = False
    """The samples' keys are names of the dataset, which may begin again in each file."""

    def __init__(self, name: str, options: FileOptions, scratch: Path):
        self.name, self._file_options, self._scratch = name, options, scratch
        self.license: str = options.license
        self.terms: str = options.terms or options.license or "no licence is stated: see the dataset's own terms"
        self._joined: list[Joined] | None = None
        self._numbered = False
        self._revisions: dict[str, str] = {}

    # -- for adapters to implement ---------------------------------------------------------------------------------

    def listing(self) -> Listing:
        """List all files, regardless of the option `units`; the identity stands for them in the declaration.

        Raises:
            RequestError: they cannot be listed.
        """
        raise NotImplementedError

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        """Stream the samples of one file, which is at `path`, in an order that is always the same.

        Where the file is damaged and nothing further can be read, the last sample has the reason `damaged_archive`;
        that is no exception. If it is the first sample as well, the unit is set aside.
        """
        raise NotImplementedError

    def opened(self, file: RemoteFile) -> AbstractContextManager[Path]:
        """Give the path of a file on this machine, for as long as it is read."""
        return local_copy(file, self._scratch)

    def why_empty(self, path: Path) -> str:
        """Say why there are no samples in the file at `path`; empty if that is nothing to worry about."""
        return ""

    def details(self) -> dict[str, Any]:
        """Declare what else the samples depend on."""
        return {}

    def tables(self) -> Sequence[JoinSpec]:
        """Name the join tables to build, listed by `list_table`; `samples` looks up in `self.table(i)`."""
        return ()

    @property
    def dataset(self) -> str:
        """The beginning of all origins: the dataset's name on the hub, or the source's."""
        return str(self._listing.identity.get("repo", self.name))

    # -- for adapters to use ---------------------------------------------------------------------------------------

    @cached_property
    def specs(self) -> Sequence[JoinSpec]:
        return self.tables()

    def list_table(self, pattern: str, what: str) -> Listing:
        """List the files of a join table; those of a hub repository at the revision that the corpus has of it."""
        return list_files(pattern, what, self._revisions)

    def table(self, number: int) -> Joined:
        """Return the built table of `specs[number]`.

        Raises:
            RuntimeError: the source is read outside of its `running`.
        """
        if self._joined is None:
            raise RuntimeError(f"source {self.name} is read outside of its running(): its tables are not there")
        return self._joined[number]

    # -- the source ------------------------------------------------------------------------------------------------

    def stage(self) -> dict[str, Any]:
        stage = {
            "adapter": self.adapter,
            "version": self.version,
            "files": self._listing.identity,
            "license": self.license,
            "max_bytes": MAX_BYTES,
            **self.details(),
        }
        if tables := self.specs:
            stage["tables"] = [
                {"files": spec.listing.identity, "key": spec.key, "fields": dict(spec.fields)} for spec in tables
            ]
        options = self._file_options
        if options.limit is not None:  # how much of a file is read depends on how many there are
            stage |= {"limit": options.limit, "units": options.units, "shuffle": options.shuffle}
        return stage

    def units(self) -> list[str]:
        return [unit_name(self.name, number) for number in self._shares]

    def keep_to_known_files(self, corpus: Corpus, grow: bool, report: Callable[[str], None]) -> None:
        """Keep to the files that the corpus knows of this source; with `grow`, new ones become new units.

        Raises:
            RequestError: there is a limit, with which a source cannot grow.
        """
        if grow and self._file_options.limit is not None:
            raise RequestError(
                f"sources.{self.name}.limit = {self._file_options.limit}: a source with a limit cannot grow, as the "
                "limit is shared out among its files; take the limit away, or build without --grow"
            )
        self._listing = kept_to(corpus, self.name, self._listing, grow, report)
        self._revisions = declared_revisions(corpus, self.name)
        for name in ("_shares", "specs"):
            self.__dict__.pop(name, None)

    def use_known_files(self, corpus: Corpus) -> bool:
        """Use the files that the corpus knows of this source, without looking for them; False if it knows none."""
        _, known = newest(corpus, self.name)
        if known is not None:
            self._listing = known.listing()
            self.__dict__.pop("_shares", None)
        return known is not None

    @contextmanager
    def running(self, corpus: Corpus, report: Callable[[str], None]) -> Iterator[None]:
        note(corpus, self.name, self._listing)
        if tables := self.specs:
            for spec in tables:
                build(corpus, spec, self._scratch, report)
            self._joined = [Joined(corpus.store, spec) for spec in tables]
        if self.has_names and (again := self._name_that_comes_again()):
            self._numbered = True
            report(f"source {self.name}: names begin again in each file ({again}); keys begin with the file's number")
        try:
            yield
        finally:
            self._joined, self._numbered = None, False

    def _name_that_comes_again(self) -> str:
        """Compare the first names of a few files; return one that two of them have. Remote files are not asked for."""
        seen: dict[str, str] = {}
        for number in list(self._shares)[:COMPARED]:
            file = self._listing.files[number]
            if "://" in file.url or not file.url:
                continue
            with closing(_generator(self.samples(Path(file.url), file, number))) as samples:
                first = next((sample.key for sample in samples if sample.key), "")
            if first and seen.setdefault(first, file.name) != file.name:
                return f"{first!r} in {seen[first]} and {file.name}"
        return ""

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        number = int(unit.rpartition("-")[2])
        file, share = self._listing.files[number], self._shares.get(number)
        if not file.url:
            raise UnreadableError(
                f"{self.dataset}/{file.name}: this file of the source is gone; put it back, then --retry-failed"
            )
        before = f"{self.dataset}/{file.name}/"
        keys = _Keys(number, self._numbered)
        with self.opened(file) as path, closing(_generator(self.samples(path, file, number))) as samples:
            ordinal = -1
            for ordinal, sample in enumerate(islice(samples, share)):
                alive()
                if ordinal == 0 and sample.reason == "damaged_archive":
                    raise UnreadableError(f"{self.dataset}/{file.name}: {what_it_is(path) or sample.detail}")
                key, duplicate = keys.next(sample.key, ordinal, sample.reason != "missing")
                origin = sample.origin if "://" in sample.origin else before + sample.origin
                common = (origin, sample.caption, self.license, sample.fields)
                if duplicate and sample.reason is None:
                    detail = f"{sample.key!r} is there a second time in {file.name}"
                    yield Input(ordinal, key, None, *common, reason="duplicate_key", detail=detail)
                else:
                    sha256 = "" if sample.data is None else hashlib.sha256(sample.data).hexdigest()
                    data = sample.data if wanted(ordinal) else None
                    yield Input(ordinal, key, data, *common, sample.reason, sample.detail, sha256)
            if ordinal < 0 and (why := self.why_empty(path)):
                raise UnreadableError(f"{self.dataset}/{file.name}: {what_it_is(path) or why}")

    # -- choice of files -------------------------------------------------------------------------------------------

    @cached_property
    def _listing(self) -> Listing:
        return self.listing()

    @cached_property
    def _shares(self) -> dict[int, int | None]:
        """The numbers of the files to read, in order, and the limit of samples of each."""
        numbers = self._chosen()
        if (limit := self._file_options.limit) is None:
            return dict.fromkeys(numbers)
        each, more = divmod(limit, len(numbers))
        return {number: each + (i < more) for i, number in enumerate(numbers) if each + (i < more)}

    def _chosen(self) -> list[int]:
        """Choose files by `units` and order them by `shuffle`; return their numbers."""
        files, options = self._listing.files, self._file_options
        numbers = list(range(len(files)))
        if (seed := options.shuffle) is not None:  # the order of two files does not depend on the others
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
    """Make the keys of one unit from the dataset's: valid in a corpus, and unique."""

    def __init__(self, number: int, numbered: bool):
        self._number, self._before = number, f"{number:06d}-" if numbered else ""
        self._raw_of: dict[str, bytes] = {}
        self._with_image = set[str]()

    def next(self, raw: str, ordinal: int, has_image: bool = True) -> tuple[str, bool]:
        """Return the key of the next sample, and if its raw key is that of an earlier one with an image."""
        numbers = f"{self._number:06d}-{ordinal:06d}"
        whole = self._before + raw if raw else numbers
        digest = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = NOT_IN_KEYS.sub("_", whole)
        if len(key) > LONGEST_KEY:
            key = self._distinguish(key, digest.hex())
        if self._raw_of.get(key, digest) != digest:  # another name that became the same
            key = self._distinguish(key, digest.hex())
        duplicate = key in self._with_image
        if has_image:
            self._with_image.add(key)
        while key in self._raw_of:
            key = self._distinguish(key, numbers)
            numbers += "_"
        self._raw_of[key] = digest
        return key, duplicate

    @staticmethod
    def _distinguish(key: str, end: str) -> str:
        """Append `-end`, within the length of a key."""
        return f"{key[: LONGEST_KEY - 1 - len(end)]}-{end}"


def _generator(samples: Iterator[FileSample]) -> Generator[FileSample]:
    """Make any iterator one that can be closed."""
    yield from samples
