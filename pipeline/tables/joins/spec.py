"""Describe a table from outside that is joined to a source by key."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from microdit.pipeline.corpus.records import canonical
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.tables.published import Table
from microdit.pipeline.tables.sample_table import JOINS

LAYOUT = 2


@dataclass(frozen=True)
class JoinSpec:
    """A table to join by key.

    Args:
        reader: `parquet`; `jsonl`, compressed with gzip or not; `json`: a list of objects; `csv`, or tsv by its name;
            `tar_txt`: a tar of `<key>.txt`; `tar_jsonl`: a tar that holds one .jsonl.
        key: the column of the key, `a/b` for two columns joined by a slash; unused by `tar_txt`.
        fields: columns of the table by the names that they get, dotted for one inside another (`Task2.Caption`).
        key_of: what is made of the key: "" nothing, `stem` (of the last part of a path, before its first dot),
            `path_dir_stem` (the folder's name, a slash, the stem).
    """

    listing: Listing
    reader: str
    key: str
    fields: Mapping[str, str]
    key_of: str = ""
    what: str = "table"
    """The field of the config, for messages."""
    first_counts: bool = False
    """Of a key that comes again the first row counts: in a dataset's own table all of them are of one sample."""
    beside: bool = False
    """The rows of each file belong to the archive of the same folder and name alone."""

    @cached_property
    def base(self) -> str:
        """Name the table's objects in the corpus, without their endings, by a hash of all that it is made from."""
        made_by = [LAYOUT, self._files(), self.reader, self.key, list(self.fields.items()), self.key_of]
        if self.beside:
            made_by.append("beside")
        return f"{JOINS}/{hashlib.sha256(canonical({'join': made_by})).hexdigest()[:32]}"

    def prefix(self, url: str) -> str | None:
        """Return what the keys of an archive's samples begin with in the table; None if no file lies beside it."""
        return self._prefixes.get(address_without_extension(url)) if self.beside else ""

    @cached_property
    def _prefixes(self) -> dict[str, str]:
        return {address_without_extension(file.url): prefix_of(file) for file in self.listing.files}

    def _files(self) -> Any:
        """Identify the files.

        The identity of their listing is not enough: it is equal for files of one name on two servers, and for a local
        file that was changed and is as long as before.
        """
        if "sha256" in self.listing.identity:
            return self.listing.identity
        versions = [(file.url.partition("?")[0], file.size, file.etag) for file in self.listing.files]
        return [self.listing.identity, versions]


def prefix_of(file: RemoteFile) -> str:
    """Return what the keys of a file begin with, in a table whose files lie beside the archives."""
    return f"{address_without_extension(file.name)}/"


def address_without_extension(url: str) -> str:
    """Cut the extension of a table or an archive off its path or URL, and a URL's query."""
    address = url.partition("?")[0] if "://" in url else url
    for ending in (".jsonl.gz", ".tar.gz", ".tar.zst"):
        if address.endswith(ending):
            return address.removesuffix(ending)
    folder, slash, name = address.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


class JoinTable(Table):
    """The record of a join table in the corpus.

    It has the names of the fields, the last key of each row group, and how many rows were left out by reason. In the
    file itself the fields are `f0`, `f1`, ..., as SQL would not tell `Long` from `long`.
    """

    fields: list[str]
    last: list[str]
    left_out: dict[str, int]
    examples: list[str]
