"""`webdataset`: tars of images with their texts beside them, under any names."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from microdit.pipeline.config.sources import WebdatasetSource
from microdit.pipeline.files.archives import members, stem
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.files.tars import Member
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample, FileSource
from microdit.pipeline.sources.joined_fields import as_text, fields_of, joined, nested_value, tables_of
from microdit.pipeline.sources.members import IMAGES, failed, text_of, whole_stem
from microdit.pipeline.tables.joins.spec import JoinSpec

TEXTS = ("txt", "json")
MAX_JSON = 8 << 20  # bytes; parsed it takes twenty times as much
MAX_MEMBERS = 100  # of a sample; more begin another one


@dataclass
class _Group:
    """Adjacent members of a tar whose names differ in the extension only: the preferred image, and the texts read."""

    name: str
    image: Member | None = None
    rank: int = 0
    texts: dict[str, Member] = field(default_factory=dict)
    extensions: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.name.rpartition("/")[2]


class Webdataset(FileSource):
    """The adapter `webdataset`. Fields: those of the options, and those of the joined tables.

    A sample fails without an image (`missing`), with json that cannot be read (`damaged_json`), and with the reasons
    of its members. Without a caption it does not fail.
    """

    adapter = "webdataset"

    def __init__(self, name: str, options: WebdatasetSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self._images = [extension.lower() for extension in options.image]
        paths = [options.caption, *options.fields.values()]
        self._texts = {text for text in TEXTS if any(path.partition(".")[0] == text for path in paths)}

    def listing(self) -> Listing:
        return list_files(self._options.files, f"sources.{self.name}.files")

    def details(self) -> dict[str, Any]:
        options = self._options
        by = [join.by for join in options.joins]
        rows_of = [join.rows_of for join in options.joins]
        told = {"rows_of": rows_of} if any(rows_of) else {}
        return {**told, **options.model_dump(include={"image", "caption", "fields", "keys"}), "joins": by}

    def tables(self) -> Sequence[JoinSpec]:
        return self._tables

    @cached_property
    def _tables(self) -> list[JoinSpec]:
        return tables_of(self.name, self._options.joins, self._listing)

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        for group in self._groups(members(path, self._is_read, MAX_BYTES)):
            yield self._sample(group, file)

    def _groups(self, members: Iterator[Member]) -> Iterator[_Group]:
        """Group the members of a tar into samples. A `damaged_archive` is one as well, without a name."""
        group = _Group("")
        for member in members:
            name, extension = whole_stem(member.name), stem(member.name)[1]
            damaged = member.reason == "damaged_archive"
            again = extension in group.extensions or len(group.extensions) == MAX_MEMBERS
            if damaged or again or name != group.name:
                if group.extensions:
                    yield group
                group = _Group("" if damaged else name)
            group.extensions.append(extension)
            rank = 0 if damaged else self._rank(extension)
            if rank is not None and (group.image is None or rank < group.rank):
                group.image, group.rank = member, rank
            elif extension in self._texts:
                group.texts[extension] = member
        if group.extensions:
            yield group

    def _sample(self, group: _Group, file: RemoteFile) -> FileSample:
        image, options = group.image, self._options
        key = group.key if options.keys == "member" else ""
        if image is None:
            wanted = " or ".join(self._images or IMAGES)
            detail = f"it has no image ({wanted}), but {', '.join(group.extensions)}"
            return FileSample(key, None, origin=group.name, reason="missing", detail=detail)
        for member in (image, *group.texts.values()):
            if member.data is None:
                return failed(member, key)
        record, fault = _parse_json(group.texts.get("json"))
        if fault:
            reason = "damaged_json" if record is None else "too_large"
            return FileSample(key, None, origin=group.texts["json"].name, reason=reason, detail=fault)
        text = text_of(group.texts.get("txt"))

        def value_at(path: str) -> object:
            return text if path == "txt" else nested_value(record, path.removeprefix("json."))

        fields = fields_of((name, value_at(path)) for name, path in options.fields.items())
        fields |= joined(options.joins, self._tables, self.table, file, group.key, image.name)
        caption = as_text(value_at(options.caption)) if options.caption else ""
        return FileSample(key, image.data, caption, image.name, fields)

    def _is_read(self, name: str) -> bool:
        # texts that no option names as well: else a sample that has lost its image would go unnoticed
        extension = stem(name)[1]
        return extension in TEXTS or self._rank(extension) is not None

    def _rank(self, extension: str) -> int | None:
        """Rank the images of a sample, of which the lowest is taken; None for other members."""
        if self._images:
            return self._images.index(extension) if extension in self._images else None
        if extension in IMAGES:
            return IMAGES.index(extension)
        last = extension.rpartition(".")[2]  # of `photo.small.jpg`
        return len(IMAGES) + IMAGES.index(last) if last in IMAGES else None


def _parse_json(member: Member | None) -> tuple[dict[str, Any] | None, str]:
    """Parse a json member; return its object and the fault, if any. Without a member an empty object."""
    if member is None or member.data is None:
        return {}, ""
    if len(member.data) > MAX_JSON:
        return {}, f"its json has {len(member.data)} bytes, at most {MAX_JSON} are read"
    try:
        record = json.loads(member.data)
    except (ValueError, RecursionError) as error:
        return None, f"its json cannot be read: {error}"
    return (record, "") if isinstance(record, dict) else (None, f"its json is no object: {member.data[:60]!r}")
