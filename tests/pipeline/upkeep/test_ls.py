"""`ls`: the committed objects of a column."""

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.upkeep.ls import ls
from tests.pipeline.helpers.small_corpus import (
    REF,
    SHARD_SAMPLES,
    fill,
    make_corpus,
    write_images,
)


def test_ls(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=2, columns=["captions/source"])
    write_images(corpus, REF, failed=range(SHARD_SAMPLES), generation=1)
    assert list(ls(corpus, "images")) == [f"{corpus_url}/{corpus.commits('images')[1].object.name}"]
    assert len(list(ls(corpus, "captions/source"))) == 2
    with pytest.raises(RequestError, match="has no such column"):
        list(ls(corpus, "captions"))
