"""`cc12m`: CC12M's tars as pixparse/cc12m-wds has them, with LLaVA-NeXT's captions if they are asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from microdit.pipeline.config.sources import Cc12mSource
from microdit.pipeline.content.alt_text import clean_caption
from microdit.pipeline.files.archives import members
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import MAX_BYTES, FileSample, FileSource
from microdit.pipeline.sources.members import NOT_TEXT, extension_of, failed, fault_fields, is_image, one_line, text_of
from microdit.pipeline.sources.neighbours import samples_with_text
from microdit.pipeline.tables.joins.spec import JoinSpec

LLAVANEXT = {"llavanext_long": "caption_llava", "llavanext_short": "caption_llava_short"}
LICENSE = "conceptual-12m"


class Cc12m(FileSource):
    """The adapter `cc12m`. Samples have the dataset's nine digits; fields: `alt` as it came, and LLaVA-NeXT's."""

    adapter = "cc12m"
    text_options = frozenset({"caption", "clean", "require_caption", "tables"})

    def __init__(self, name: str, options: Cc12mSource, scratch: Path):
        super().__init__(name, options, scratch)
        self._options = options
        self.license = options.license or LICENSE
        self.terms = (
            "Conceptual 12M: links and alt-texts free for any purpose, acknowledge Google LLC; each image is its "
            "owner's (https://github.com/google-research-datasets/conceptual-12m)"
        )

    def listing(self) -> Listing:
        return list_files(self._options.files, f"sources.{self.name}.files")

    def details(self) -> dict[str, Any]:
        options = self._options
        return {"caption": options.caption, "clean": options.clean, "require_caption": options.require_caption}

    def tables(self) -> Sequence[JoinSpec]:
        if self._options.llavanext is None:
            return []
        listing = self.list_table(self._options.llavanext, f"sources.{self.name}.llavanext")
        reader = "parquet" if listing.files[0].name.endswith(".parquet") else "jsonl"
        return [JoinSpec(listing, reader, "key", LLAVANEXT, what=f"sources.{self.name}.llavanext", first_counts=True)]

    def samples(self, path: Path, file: RemoteFile, number: int) -> Iterator[FileSample]:
        options = self._options
        table = self.table(0) if self.specs else None
        read = members(path, lambda name: is_image(name) or extension_of(name) == "txt", MAX_BYTES)
        for key, image, text in samples_with_text(read):
            if image.reason is not None:
                yield failed(image, key)
                continue
            row = (table.get(key) if table is not None else None) or {}
            faults = dict[str, str]()
            captions = {"alt": text_of(text, "alt", faults)}
            captions |= {name: one_line(row.get(name)) for name in LLAVANEXT}
            fields = {name: text for name, text in captions.items() if text} | fault_fields(faults)
            caption = captions[options.caption]
            if options.caption == "alt" and options.clean:
                caption = clean_caption(caption)
            if caption or not options.require_caption:
                yield FileSample(key, image.data, caption, image.name, fields)
            else:
                cleaned = "; cleaning left nothing of it" if captions[options.caption] else ""
                fault = faults.get(options.caption)
                reason = NOT_TEXT if fault else "no_caption"
                detail = fault or f"it has no caption {options.caption!r}{cleaned}"
                yield FileSample(key, None, "", image.name, fields, reason, detail)
