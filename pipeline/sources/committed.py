"""Stand in for a source that is gone: what is committed of it needs it no more."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import UNITS
from microdit.pipeline.sources.source import Input


class CommittedSource:
    """The units of a declared source that are committed.

    Args:
        error: why the source itself cannot be used.
    """

    def __init__(self, corpus: Corpus, name: str, error: RequestError):
        self.name, self._error = name, error
        self.terms = "only what is committed is used"
        self._made_by = corpus.source(name).made_by
        self._units = sorted(unit for _, unit in corpus.committed(UNITS, name))

    def stage(self) -> dict[str, Any]:
        return {key: value for key, value in self._made_by.items() if key != "images"}

    def units(self) -> list[str]:
        return self._units

    def read(self, unit: str, wanted: Callable[[int], bool]) -> Generator[Input]:
        raise self._error
        yield

    def running(self, corpus: Corpus, report: Callable[[str], None]) -> AbstractContextManager[None]:
        return nullcontext()
