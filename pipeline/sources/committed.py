"""Stand in for a source that is gone: what is committed of it needs it no more."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from microdit.pipeline.base.errors import RequestError, UnreadableError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import UNITS
from microdit.pipeline.corpus.redeclare import latest_declaration
from microdit.pipeline.sources.file_source import FileSource
from microdit.pipeline.sources.source import Input, Source


class CommittedSource:
    """The units of a declared source that are committed.

    Args:
        error: why the source itself cannot be used.
    """

    def __init__(self, corpus: Corpus, name: str, error: RequestError):
        self.name, self._error = name, error
        self.terms = "only what is committed is used"
        _, declaration = latest_declaration(corpus, name)
        self._made_by = declaration.made_by
        self._units = sorted(unit for _, unit in corpus.committed(UNITS, name))

    def stage(self) -> dict[str, Any]:
        return {key: value for key, value in self._made_by.items() if key != "images"}

    def units(self) -> list[str]:
        return self._units

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        raise UnreadableError(f"{unit}: {self._error}")
        yield

    def running(self, corpus: Corpus, report: Callable[[str], None]) -> AbstractContextManager[None]:
        return nullcontext()


def unread_units(corpus: Corpus, name: str, source: Source | None) -> int:
    """Count the units of a source that is gone that are not committed; 0 if the corpus does not know how many it had.

    Args:
        source: the source, if it could be made.
    """
    read = {unit for _, unit in corpus.committed(UNITS, name)}
    if isinstance(source, FileSource):
        return len(set(source.units()) - read) if source.use_known_files(corpus) else 0
    units = corpus.source(name).made_by.get("units")
    return max(units - len(read), 0) if isinstance(units, int) else 0
