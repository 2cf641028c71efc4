"""The base of adapters whose options say where captions, fields and joined tables come from."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from microdit.pipeline.config.files import JOINED, MappedOptions
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.files.split_files import joined_copy, with_parts_joined
from microdit.pipeline.sources.caption_choices import captions_of, choose
from microdit.pipeline.sources.file_source import FileSource
from microdit.pipeline.sources.joined_fields import Plain, as_text, declared_later, fields_of, joined, tables_of
from microdit.pipeline.sources.members import fault_fields
from microdit.pipeline.tables.joins.spec import JoinSpec


class MappedSource(FileSource):
    """Base of the layouts that people have. Fields: those of the options, and those of the joined tables."""

    text_options = frozenset({"caption", "fields", "texts", "joins", "tables", "rows_of"})

    def __init__(self, name: str, options: MappedOptions, scratch: Path):
        super().__init__(name, options, scratch)
        self._mapped = options

    def listing(self) -> Listing:
        what = f"sources.{self.name}.files"
        return with_parts_joined(list_files(self._mapped.files, what), what)

    def opened(self, file: RemoteFile) -> AbstractContextManager[Path]:
        return joined_copy(file, self._scratch)

    def details(self) -> dict[str, Any]:
        options = self._mapped
        return {
            **declared_later(options.texts, options.joins),
            **options.model_dump(include={"image", "caption", "fields", "key", "keys"}),
            "joins": [join.by for join in options.joins],
        }

    def tables(self) -> Sequence[JoinSpec]:
        return tables_of(self.name, self._mapped.joins, self._listing, self.list_table)

    def caption_and_fields(
        self, values: Mapping[str, object], file: RemoteFile, key: str, origin: str, faults: dict[str, str]
    ) -> tuple[str, dict[str, Plain]]:
        """Make the caption and the fields of a sample, with those of the joined tables and what is wrong with them.

        Args:
            values: what the dataset has, by the options of `MappedOptions.paths`; a caption is a text or a list.
            key: the sample's key in the dataset.
            faults: what is wrong with texts that were read already, by field.
        """
        options = self._mapped
        made = fields_of(((name, values.get(f"fields.{name}")) for name in options.fields), faults)
        tables = joined(options.joins, self.specs, self.table, file, key, origin)
        made |= tables
        if isinstance(options.caption, str):
            name = options.caption.removeprefix(JOINED)
            value = tables.get(name) if options.caption.startswith(JOINED) else values.get("caption")
            text = as_text(value, faults, options.texts)
        else:
            captions = captions_of(options, values, tables, faults)
            made |= captions
            text = choose(options.choices, captions, f"{file.name}/{origin}")
        return text, made | fault_fields(faults)
