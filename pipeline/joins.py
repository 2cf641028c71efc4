"""Tables to look samples up in by key: built once into the corpus, sorted, and read a row group at a time."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.corpus import Corpus
from pipeline.sources.remote import Listing
from pipeline.store import Store

Value = Any
"""What a table says: str, int, float, bool or None; of nested things their JSON text."""


@dataclass(frozen=True)
class JoinSpec:
    """A table of things to know about samples."""

    listing: Listing
    """Its files, read in order: where a key comes twice, the first one stays."""
    reader: Literal["parquet", "jsonl", "tar_txt", "tar_jsonl"]
    """`jsonl` also behind gzip; `tar_txt` is a tar (packed or not) of `<key>.txt`; `tar_jsonl` one with jsonl inside."""
    key: str
    """The column with the key, dotted inside of structs; several, joined by `/`, as in `part_id/image_name`: then the
    keys are `12/0b4f.webp`. Put first what a unit's samples share, as neighbours are cheap. Of `tar_txt` it is not asked."""
    fields: Mapping[str, str]
    """Name here: column there (dotted inside of structs). The one column of `tar_txt` is `txt`."""
    key_of: Literal["", "stem", "path_stem"] = ""
    """What to take of a key: all, `stem` (`a/12.x.jpg` is `12`), or `path_stem` (`./a/12.jpg` is `a/12`)."""


def build(corpus: Corpus, spec: JoinSpec, scratch: Path, say: Callable[[str], None]) -> None:
    """Have the table in the corpus. If it is there, nothing is read.

    Raises:
        RequestError: a file cannot be read as what it is said to be, has not the columns, or no row with a key.
    """
    raise NotImplementedError


class Joined:
    """A table that was built, opened by the first look-up. Picklable; not for several threads at once."""

    def __init__(self, store: Store, spec: JoinSpec):
        self._store, self._spec = store, spec

    def get(self, key: str) -> dict[str, Value] | None:
        """The fields of a key, or None if the table does not have it. Next to the last key asked it costs little.

        Raises:
            FileNotFoundError: the table was not built, or somebody removed it.
        """
        raise NotImplementedError

    def get_many(self, keys: Iterable[str]) -> dict[str, dict[str, Value]]:
        """Of those keys that the table has, the fields; each part of the table is read at most once."""
        raise NotImplementedError
