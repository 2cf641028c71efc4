"""The base of adapters whose options say where captions, fields and joined tables come from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microdit.pipeline.config.sources import MappedOptions
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import FileSource
from microdit.pipeline.sources.joined_fields import Plain, as_text, declared_later, fields_of, joined, tables_of
from microdit.pipeline.sources.members import fault_fields
from microdit.pipeline.tables.joins.spec import JoinSpec


class MappedSource(FileSource):
    """Base of `webdataset` and `parquet`. Fields: those of the options, and those of the joined tables."""

    text_options = frozenset({"caption", "fields", "texts", "joins", "tables", "rows_of"})

    def __init__(self, name: str, options: MappedOptions, scratch: Path):
        super().__init__(name, options, scratch)
        self._mapped = options

    def listing(self) -> Listing:
        return list_files(self._mapped.files, f"sources.{self.name}.files")

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
        self,
        caption: object,
        fields: Mapping[str, object],
        file: RemoteFile,
        key: str,
        origin: str,
        faults: dict[str, str],
    ) -> tuple[str, dict[str, Plain]]:
        """Make the caption and the fields of a sample, with those of the joined tables and what is wrong with them.

        Args:
            caption: as the dataset has it: a text, or a list of texts.
            key: the sample's key in the dataset.
            faults: what is wrong with texts that were read already, by field.
        """
        made = fields_of(fields.items(), faults)
        made |= joined(self._mapped.joins, self.specs, self.table, file, key, origin)
        text = as_text(caption, faults, self._mapped.texts)
        return text, made | fault_fields(faults)
