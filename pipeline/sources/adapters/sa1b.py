"""`sa1b`: SA-1B's tars by Meta's list of links or from a mirror, with the captions of a table beside them.

Meta's list has lines for other files, too; the links in it are signed and expire. A tar is known by its name and never
by its link, so that a new list goes on where the old one ended.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.sources import Sa1bSource
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.files.archives import members
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample, FileSource
from microdit.pipeline.sources.members import NOT_TEXT, extension_of, failed, fault_fields, is_image, one_line, text_of
from microdit.pipeline.sources.neighbours import samples_with_text
from microdit.pipeline.tables.joins.spec import JoinSpec

PAGE = "https://ai.meta.com/datasets/segment-anything-downloads/"
SHARD = re.compile(r"sa_\d{6}\.tar")
LICENSE = "SA-1B Dataset Research License"


class Sa1b(FileSource):
    """The adapter `sa1b`. Samples are called `sa_<number>`; fields: `joined` and `txt`, the captions that there are."""

    adapter = "sa1b"
    text_options = frozenset({"caption", "require_caption", "tables"})

    def __init__(self, name: str, options: Sa1bSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self.license = options.license or LICENSE
        self.terms = f"{LICENSE}: research, not commercial, not passed on; accept it at {PAGE}"

    def listing(self) -> Listing:
        if self._options.files is not None:
            return list_files(self._options.files, f"sources.{self.name}.files")
        files = read_links(str(self._options.links), f"sources.{self.name}.links")
        names = "\n".join(file.name for file in files)
        return Listing(files, {"files": hashlib.sha256(names.encode()).hexdigest()})

    def details(self) -> dict[str, Any]:
        return {"caption": self._options.caption, "require_caption": self._options.require_caption}

    def tables(self) -> Sequence[JoinSpec]:
        options = self._options
        if options.captions is None:
            return []
        listing = self.list_table(options.captions, f"sources.{self.name}.captions")
        name = listing.files[0].name
        if name.endswith((".tar.gz", ".tgz", ".tar")):
            return [JoinSpec(listing, "tar_txt", "", {"joined": "txt"}, "stem", f"sources.{self.name}.captions", True)]
        reader = "parquet" if name.endswith(".parquet") else "jsonl"
        return [
            JoinSpec(
                listing,
                reader,
                options.captions_key,
                {"joined": options.captions_text},
                "stem",
                f"sources.{self.name}.captions",
                first_counts=True,
            )
        ]

    @contextmanager
    def running(self, corpus: Corpus, report: Callable[[str], None]) -> Iterator[None]:
        if self._options.links is not None:
            chosen = [self._listing.files[int(unit.rpartition("-")[2])] for unit in self.units()]
            if note := check_expiry(chosen, f"sources.{self.name}.links = {self._options.links!r}", time.time()):
                report(f"source {self.name}: {note}")
        with super().running(corpus, report):
            yield

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        table = self.table(0) if self.specs else None
        read = members(path, lambda name: is_image(name) or extension_of(name) == "txt", MAX_BYTES)
        for key, image, text in samples_with_text(read):
            if image.reason is not None:
                yield failed(image, key)
                continue
            row = None if table is None else table.get(key)
            faults = dict[str, str]()
            captions = {"joined": one_line((row or {}).get("joined")), "txt": text_of(text, "txt", faults)}
            caption = captions[self._options.caption]
            fields = {name: text for name, text in captions.items() if text} | fault_fields(faults)
            if caption or not self._options.require_caption:
                yield FileSample(key, image.data, caption, image.name, fields)
            else:
                where = "the table of captions has none" if table is not None else "the tar has none"
                fault = faults.get(self._options.caption)
                reason, detail = (NOT_TEXT, fault) if fault else ("no_caption", f"{where} for {key}")
                yield FileSample(key, None, "", image.name, fields, reason, detail)


def read_links(path: str, what: str) -> tuple[RemoteFile, ...]:
    """Read the tars of Meta's list, in the order of their numbers; other lines of it are skipped.

    Raises:
        RequestError: the list cannot be read, or has no tars.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RequestError(
            f"{what} = {path!r}: it cannot be read ({error.strerror}); get the list of links at {PAGE}"
        ) from None
    links: dict[str, str] = {}
    for line in lines:
        name, _, link = line.strip().lstrip("\ufeff").partition("\t")
        if SHARD.fullmatch(name.strip()) and urlsplit(link.strip()).scheme in ("http", "https"):
            links[name.strip()] = link.strip()  # the last one, as in a list to which new links were added
    if not links:
        raise RequestError(
            f"{what} = {path!r}: it has no line such as sa_000000.tar<TAB>https://...; get the list of links at {PAGE}"
        )
    return tuple(RemoteFile(name, links[name]) for name in sorted(links))


def expires(link: str) -> int | None:
    """Return when a signed link expires, in seconds since 1970, from the hex in its `oe`; None without one."""
    oe = parse_qs(urlsplit(link).query).get("oe", [""])[0]
    return int(oe, 16) if re.fullmatch("[0-9a-fA-F]{8}", oe) else None


def check_expiry(files: Sequence[RemoteFile], what: str, now: float) -> str:
    """Return a line on when the first link expires; empty if the links do not tell.

    Raises:
        RequestError: some links have expired.
    """
    ends = [end for file in files if (end := expires(file.url)) is not None]
    if not ends:
        return ""
    first = f"{datetime.fromtimestamp(min(ends), UTC):%Y-%m-%d %H:%M} UTC"
    if over := sum(end <= now for end in ends):
        raise RequestError(
            f"{what}: {over} of its {len(files)} links have expired, the first on {first}; "
            f"get a new list at {PAGE}, replace the old one by it and run the same command: it goes on"
        )
    return f"its links expire from {first} on, in {(min(ends) - now) / 3600:.0f} hours; then get a new list and go on"
