"""`folder`: pictures in folders, with their texts beside them or in one table."""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.liveness import alive
from microdit.pipeline.config.files import text_member
from microdit.pipeline.config.layouts import FolderSource
from microdit.pipeline.files.archives import is_of_macos
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile, digest, listing
from microdit.pipeline.files.tars import Member
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample
from microdit.pipeline.sources.joined_fields import nested_value
from microdit.pipeline.sources.mapped_source import MappedSource
from microdit.pipeline.sources.members import is_image, text_of

HUB_FOLDER = re.compile(r"hf://datasets/[^/]+/[^/]+/(.+)")


class Folder(MappedSource):
    """The adapter `folder`. A unit is `unit_inputs` pictures of one folder, and is called by the folder's path.

    Fields: those of the options, and those of the joined tables. A picture fails if it is not there any more
    (`missing`) or `too_large`, or if its json cannot be read (`damaged_json`).
    """

    adapter = "folder"

    def __init__(self, name: str, options: FolderSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self._pictures: dict[str, list[RemoteFile]] = {}
        self._texts: dict[str, RemoteFile] = {}

    def listing(self) -> Listing:
        """List the pictures, folder by folder; the files of the listing are their groups."""
        options, what = self._options, f"sources.{self.name}.files"
        whole = list_files(f"{options.files.rstrip('/')}/**", what)
        extensions = {text_member(path)[0] for path in options.paths().values()}
        folders: dict[str, list[RemoteFile]] = {}
        self._pictures, self._texts = {}, {}
        inner = HUB_FOLDER.match(options.files)
        before = f"{inner[1].rstrip('/')}/" if inner else ""  # the hub's files have their whole path as a name
        for found in whole.files:
            file = replace(found, name=found.name.removeprefix(before))
            name = file.name.rpartition("/")[2]
            if is_of_macos(file.name) or name.startswith("."):
                continue
            if is_image(name):
                folders.setdefault(file.name.rpartition("/")[0] or ".", []).append(file)
            elif name.rpartition(".")[2].lower() in {extension.rpartition(".")[2] for extension in extensions}:
                self._texts[file.name] = file
        if not folders:
            raise RequestError(
                f"{what} = {options.files!r}: there is no picture below it among its {len(whole.files):,} files, such "
                f"as {whole.files[0].name}; expected .jpg, .png, .webp and so on"
            )
        groups = []
        for folder, files in folders.items():
            for first in range(0, len(files), options.unit_inputs):
                name = f"{folder}#{first // options.unit_inputs}" if first else folder
                self._pictures[name] = group = files[first : first + options.unit_inputs]
                etag = digest((file.name, file.size) for file in group)
                groups.append(RemoteFile(name, group[0].url, sum(file.size or 0 for file in group), etag))
        if "repo" in whole.identity:
            return listing(groups, whole.identity)
        return listing(groups, {"files": digest((group.name, group.size, group.etag) for group in groups)})

    def details(self) -> dict[str, Any]:
        return super().details() | {"unit_inputs": self._options.unit_inputs}

    def opened(self, file: RemoteFile) -> AbstractContextManager[Path]:
        return nullcontext(Path(file.url))  # of a group nothing is fetched but its pictures, one by one

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        for picture in self._pictures[file.name]:
            alive()
            yield self._sample(picture, file)

    def _sample(self, picture: RemoteFile, group: RemoteFile) -> FileSample:
        origin, options = picture.name.rpartition("/")[2], self._options
        stem = picture.name.rpartition(".")[0]
        data = self._read(picture)
        if data.data is None:
            return FileSample("", None, origin=origin, reason=data.reason, detail=data.detail)
        texts = {text_member(path)[0]: Member("", None) for path in options.paths().values()}
        for extension in texts:
            if (text := self._texts.get(f"{stem}.{extension}")) is not None:
                texts[extension] = self._read(text)
                if texts[extension].data is None:
                    return FileSample("", None, origin=origin, reason=texts[extension].reason, detail=text.name)
        faults: dict[str, str] = {}
        values: dict[str, object] = {}
        for option, path in options.paths().items():
            extension, field = text_member(path)
            member = texts[extension]
            if not field:
                values[option] = text_of(member, option.removeprefix("fields."), faults)
            elif member.data is not None:
                try:
                    values[option] = nested_value(json.loads(member.data), field)
                except (ValueError, RecursionError) as error:
                    detail = f"its json cannot be read: {error}"
                    return FileSample("", None, origin=origin, reason="damaged_json", detail=detail)
        key = stem.rpartition("/")[2]
        caption, fields = self.caption_and_fields(values, group, key, picture.name, faults)
        return FileSample("", data.data, caption, origin, fields)

    def _read(self, file: RemoteFile) -> Member:
        try:
            with local_copy(file, self._scratch) as path, path.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return Member(file.name, None, "missing", "it was listed, and is not there any more")
        if len(data) > MAX_BYTES:
            return Member(file.name, None, "too_large", f"more than the {MAX_BYTES} bytes that are read")
        return Member(file.name, data)
