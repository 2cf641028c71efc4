"""Read the texts of a source again whose options were corrected: its pictures stay."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit
from microdit.pipeline.corpus.redeclare import DECLARATION
from microdit.pipeline.corpus.retry_units import base_of
from microdit.pipeline.files.remote_file import Listing, RemoteFile
from microdit.pipeline.sources.file_source import FileSource
from microdit.pipeline.tables.joins.build import SPILL, build
from microdit.pipeline.tables.joins.lookup import Joined
from microdit.pipeline.tables.joins.spec import JoinSpec

TEXTS = {"caption": "caption", "fields": "fields"}


@dataclass(frozen=True)
class Correction:
    """The newest declaration of a source, and the source, which must be `running` when its texts are read."""

    number: int
    fingerprint: str
    source: FileSource
    scratch: Path

    def texts(self, corpus: Corpus, unit: str, origins: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """Return `caption` and `fields` of the inputs of a unit that has committed shards, by origin.

        They are read once, into a table that is cached in the corpus; a retry unit's are in that of its unit.

        Raises:
            UnreadableError: the unit's file is gone, or cannot be read.
        """
        unit = base_of(unit)
        with TemporaryDirectory(dir=self._made_scratch(), prefix=SPILL) as folder:
            path = Path(folder) / f"{unit}.jsonl"
            identity = {"sha256": [self.fingerprint, unit]}
            listing = Listing((RemoteFile(path.name, str(path)),), identity)
            what = f"source {self.source.name}: texts of {unit}"
            spec = JoinSpec(listing, "jsonl", "origin", TEXTS, what=what)
            if not corpus.store.exists(f"{spec.base}.json"):
                with path.open("w", encoding="utf-8") as file:
                    for item in self.source.read(unit, lambda ordinal: False):
                        fields = (
                            json.dumps(dict(item.fields), ensure_ascii=False, sort_keys=True) if item.fields else ""
                        )
                        line = {"origin": item.origin, "caption": item.caption, "fields": fields}
                        file.write(json.dumps(line) + "\n")
                build(corpus, spec, self.scratch, lambda note: None)
            return Joined(corpus.store, spec).get_many(origins)

    def _made_scratch(self) -> Path:
        self.scratch.mkdir(parents=True, exist_ok=True)
        return self.scratch


def is_outdated(commit: Commit, number: int) -> bool:
    """Return True if the texts of a commit are of an earlier declaration than this one."""
    return int(commit.timings.get(DECLARATION, 0)) < number
