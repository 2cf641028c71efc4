"""Names that are refused: of columns, of sources, and keys."""

from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from tests.pipeline.helpers.small_corpus import (
    REF,
    make_corpus,
)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "a b", "../x", "a/..", ".", "a/.b", "units", "commits/x", "tables", "a/"]
)
def test_bad_column_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="a name has one or two parts"):
        Corpus.create(tmp_path, "x").declare_column(name, {})


@pytest.mark.parametrize("name", ["", "CC12M", "-a", "a/b", "a.b", ".."])
def test_bad_source_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="a name is lower-case letters"):
        Corpus.create(tmp_path, "x").declare_source(name, {})


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "é", "a b", "x" * 81])
def test_bad_keys(tmp_path: Path, key: str) -> None:
    corpus = make_corpus(tmp_path)
    with begin_attempt(corpus, "images", REF) as attempt:
        with pytest.raises(ValueError, match="expected 1 to 80"):
            attempt.add(0, key, {"jpg": b"x"})
        with pytest.raises(ValueError, match="expected 1 to 80"):
            attempt.fail(0, key, "timeout")
