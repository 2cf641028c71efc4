"""Tell a corpus's own objects from whatever else lies below its root (docs/reference/corpus.md, section 9)."""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.failures import FAILURE
from microdit.pipeline.corpus.names import COLUMN, COMMIT, OBJECT, PART, PROBES, RESERVED, SHARD, SOURCE, TABLE, UNITS
from microdit.pipeline.corpus.retry_units import NAME as RETRIED

SELECTION = re.compile(r"selections/[A-Za-z0-9_-][A-Za-z0-9_.-]*@[0-9a-f]{16}\.parquet")
PROBE = re.compile(rf"{PROBES}/[^/]+")
DECLARED = re.compile(rf"(?:columns/({COLUMN.pattern})|sources/({SOURCE.pattern}))\.json")
CORPUS_PART = re.compile(rf"(.+?)/(?:corpus\.json|columns/{COLUMN.pattern}\.json|sources/{SOURCE.pattern}\.json)")
CORPUS_COMMIT = re.compile(rf"(.+?)/{COMMIT.pattern}")


@dataclass(frozen=True)
class Ownership:
    """The columns and sources that a corpus declares, and the folders below its root that are other corpora."""

    columns: Collection[str]
    sources: Collection[str]
    foreign: Collection[str] = field(default=())
    """Without a slash at the end."""

    @classmethod
    def of(cls, corpus: Corpus, names: Iterable[str]) -> "Ownership":
        """Read the names of the declarations, and look for other corpora among the names of all objects."""
        columns, sources = set(_declared(corpus, "columns")), set(_declared(corpus, "sources"))
        own = cls(columns, sources)
        roots = {match[1] for name in names if not own.owns(name) and (match := _part_of_another(name))}
        return cls(columns, sources, sorted(root for root in roots if not _below(root, roots)))

    def owns(self, name: str) -> bool:
        """Return True if this corpus's writers may have written an object of this name."""
        if _below(name, self.foreign):
            return False
        if match := COMMIT.fullmatch(name):
            return (match[1] in self.columns or match[1] == UNITS) and match[2] in self.sources
        patterns = (DECLARED, TABLE, PART, SELECTION, FAILURE, PROBE, RETRIED)
        if name == "corpus.json" or any(pattern.fullmatch(name) for pattern in patterns):
            return True
        return self.owns_attempt(name)

    def owns_attempt(self, name: str) -> bool:
        """Return True for an attempt's object: a shard of a declared source, in a declared column."""
        match = OBJECT.fullmatch(name)
        if not match or _below(name, self.foreign) or match[1].split("/")[0] in RESERVED:
            return False
        is_shard = SHARD.fullmatch(match[3]) and match[3].startswith(f"{match[2]}-")
        return bool(is_shard) and match[1] in self.columns and match[2] in self.sources

    def owns_table(self, name: str) -> bool:
        """Return True for a cached table, its record, or a part of the sample table."""
        return bool(TABLE.fullmatch(name) or PART.fullmatch(name)) and not _below(name, self.foreign)

    def owns_probe(self, name: str) -> bool:
        """Return True for the probe of a build."""
        return bool(PROBE.fullmatch(name)) and not _below(name, self.foreign)


def _declared(corpus: Corpus, folder: str) -> Iterator[str]:
    """List what is declared, by the names alone: a damaged declaration counts."""
    for name in corpus.store.names(folder):
        if match := DECLARED.fullmatch(name):
            yield match[1] or match[3]


def _part_of_another(name: str) -> re.Match[str] | None:
    """Match an object that only a corpus has, in a folder below the root: the first group is that folder."""
    return CORPUS_PART.fullmatch(name) or CORPUS_COMMIT.fullmatch(name)


def _below(name: str, folders: Collection[str]) -> bool:
    """Return True if a name lies in one of these folders, at any depth."""
    if not folders:
        return False
    parts = name.split("/")
    return any("/".join(parts[:depth]) in folders for depth in range(1, len(parts)))
