"""Describe a table from outside that is joined to a source by key."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from microdit.pipeline.corpus.records import canonical
from microdit.pipeline.files.remote_file import Listing
from microdit.pipeline.tables.published import Table
from microdit.pipeline.tables.sample_table import JOINS

LAYOUT = 2


@dataclass(frozen=True)
class JoinSpec:
    """A table to join by key.

    reader: `parquet`; `jsonl`, packed with gzip or not; `tar_txt`: a tar of `<key>.txt`; `tar_jsonl`: a tar that holds
        one .jsonl.
    key: the column of the key, `a/b` for two columns joined by a slash; of no meaning in a `tar_txt`.
    fields: name here: column there, dotted for what is inside another (`Task2.Caption`).
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

    @cached_property
    def base(self) -> str:
        """What its objects in the corpus begin with."""
        made_by = [LAYOUT, self._files(), self.reader, self.key, list(self.fields.items()), self.key_of]
        return f"{JOINS}/{hashlib.sha256(canonical({'join': made_by})).hexdigest()[:32]}"

    def _files(self) -> Any:
        """Which files these are. Their listing's identity is too little: it is equal for files of one name on two
        servers, and for a local file that was changed and is as long as before."""
        if "sha256" in self.listing.identity:
            return self.listing.identity
        places = [(file.url.partition("?")[0], file.size, file.etag) for file in self.listing.files]
        return [self.listing.identity, places]


class JoinTable(Table):
    """The record of a table in the corpus: beside it the fields' names, the last key of each row group, and what was
    left out and why. In the file itself the fields are `f0`, `f1`, ..., as SQL would not tell `Long` from `long`."""

    fields: list[str]
    last: list[str]
    left_out: dict[str, int]
    examples: list[str]
