"""`webdataset`: tars of images with their texts beside them, under any names."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microdit.pipeline.config.files import text_member
from microdit.pipeline.config.layouts import WebdatasetSource
from microdit.pipeline.files.archives import members, stem
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.files.tars import Member
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample
from microdit.pipeline.sources.joined_fields import nested_value
from microdit.pipeline.sources.mapped_source import MappedSource
from microdit.pipeline.sources.members import IMAGES, failed, text_of
from microdit.pipeline.sources.neighbours import NOT_TAKEN, Neighbours, TarSample, neighbours, rank

TEXTS = ("txt", "json")
NOT_SIDE_BY_SIDE = "not_side_by_side"
REPACK = "members of a sample must be neighbours: pack the tar again with its names sorted (tar --sort=name)"
MAX_NAMES = 1 << 20  # of a tar, remembered to tell members that lie apart
MAX_JSON = 8 << 20  # bytes; parsed it takes twenty times as much


class Webdataset(MappedSource):
    """The adapter `webdataset`. Fields: those of the options, and those of the joined tables.

    A sample fails without an image (`missing`, `not_side_by_side`), with json that cannot be read (`damaged_json`), and
    with the reasons of its members. Without a caption it does not fail. An image of which another one is taken is a
    failed row (`not_taken`).
    """

    adapter = "webdataset"

    def __init__(self, name: str, options: WebdatasetSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self._images = [extension.lower() for extension in options.image]
        self.has_names = options.keys == "member"
        named = [text_member(path) for path in options.paths().values()]
        self._texts = {extension for extension, _ in named}
        self._records = sorted({extension for extension, field in named if field})

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        seen = _SeenNames()
        for group in neighbours(members(path, self._is_read, MAX_BYTES)):
            if group.damaged is not None:
                yield failed(group.damaged, "")
                continue
            samples = group.samples(self._images, self._texts)
            apart = seen.add(group.name, bool(samples), bool(self._texts & group.members.keys()))
            if not samples and group.members.keys() & {*TEXTS, *self._texts}:
                yield self._without_image(group, apart)
            for sample in samples:
                yield self._sample(sample, file, apart)
                for other in sample.others:
                    key = other.name.rpartition("/")[2] if self._options.keys == "member" else ""
                    detail = f"of this sample {sample.image.name} is taken; `image` names the extensions to take"
                    yield FileSample(key, None, origin=other.name, reason=NOT_TAKEN, detail=detail)

    def why_empty(self, path: Path) -> str:
        extensions = Counter[str]()

        def note(name: str) -> bool:
            if not name.endswith("/"):
                extensions[stem(name)[1]] += 1
            return False

        list(members(path, note, 0))
        if not extensions:
            return ""
        found = ", ".join(f"{count:,} .{extension}" for extension, count in extensions.most_common(8))
        example = extensions.most_common(1)[0][0]
        known = " or ".join(self._images or IMAGES)
        return (
            f"none of its members has a known extension; it has {found}, expected {known}. "
            f"Name those of the images and of the texts, for example image: [{example}], caption: cap; "
            "if units of this source are committed already, in a source of a new name"
        )

    def _without_image(self, group: Neighbours, apart: bool) -> FileSample:
        key = group.name.rpartition("/")[2] if self._options.keys == "member" else ""
        if apart:
            detail = f"its image came before; {REPACK}"
            return FileSample(key, None, origin=group.name, reason=NOT_SIDE_BY_SIDE, detail=detail)
        wanted = " or ".join(self._images or IMAGES)
        detail = f"it has no image ({wanted}), but {', '.join(group.members)}"
        return FileSample(key, None, origin=group.name, reason="missing", detail=detail)

    def _sample(self, sample: TarSample, file: RemoteFile, apart: bool) -> FileSample:
        image, options = sample.image, self._options
        key = sample.key if options.keys == "member" else ""
        for member in (image, *sample.texts.values()):
            if member.data is None:
                return failed(member, key)
        records: dict[str, dict[str, Any]] = {}
        for extension in self._records:
            record, fault = _parse_json(sample.texts.get(extension))
            if fault:
                reason = "damaged_json" if record is None else "too_large"
                return FileSample(key, None, origin=sample.texts[extension].name, reason=reason, detail=fault)
            records[extension] = record or {}
        faults: dict[str, str] = {}

        def value_at(path: str, name: str) -> object:
            extension, field = text_member(path)
            if field:
                return nested_value(records[extension], field)
            return text_of(sample.texts.get(extension), name, faults)

        values = {option: value_at(path, option.removeprefix("fields.")) for option, path in options.paths().items()}
        caption, fields = self.caption_and_fields(values, file, sample.key, image.name, faults)
        if apart and not sample.texts:
            fields[NOT_SIDE_BY_SIDE] = f"its texts came before its image; {REPACK}"
        return FileSample(key, image.data, caption, image.name, fields)

    def _is_read(self, name: str) -> bool:
        # texts that no option names as well: else a sample that has lost its image would go unnoticed
        extension = stem(name)[1]
        own = any(extension.endswith(f".{text}") for text in self._texts)  # `05.txt` of the sample `22.05`
        return own or extension in TEXTS or extension in self._texts or rank(extension, self._images) is not None


class _SeenNames:
    """The names of the samples of a tar that came with an image, and of those with texts alone."""

    def __init__(self) -> None:
        self._with_image: set[int] = set()
        self._texts_alone: set[int] = set()

    def add(self, name: str, image: bool, texts: bool) -> bool:
        """Note a sample; return True if its image or its texts came before, not side by side with it."""
        code = hash(name)
        apart = code in (self._texts_alone if image else self._with_image)
        if len(self._with_image) + len(self._texts_alone) < MAX_NAMES:
            (self._with_image if image else self._texts_alone).add(code)
        return apart


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
