"""What is learned from the commits of a past build."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.estimate.past_build import PastBuild, spread
from tests.pipeline.helpers.tar_build import (
    COLUMNS,
    small,
)

__all__ = ["small"]


def test_commits_say_what_was_worked(small: Corpus) -> None:
    for column in (IMAGES, *COLUMNS):
        for commit in small.commits(column):
            assert commit.device == "cpu" and 0 <= commit.timings["cpu_seconds"] < 600
            assert ("wait_seconds" in commit.timings) is (column == IMAGES)
    pace = PastBuild(small.url).pace([IMAGES], "own")
    assert pace is not None and pace.has_cpu and pace.devices == {"cpu"} and pace.shards == 6


@given(st.integers(0, 2000), st.integers(1, 300))
def test_spread_takes_some_of_all(count: int, most: int) -> None:
    taken = spread(range(count), most)
    assert len(taken) == min(count, most) == len(set(taken)) and taken == sorted(taken)
    assert not taken or (taken[0] == 0 and count - taken[-1] <= 2 * count / most + 1)


def test_an_empty_corpus_teaches_nothing(tmp_path: Path) -> None:
    Corpus.create(tmp_path, "empty", 10)
    with pytest.raises(RequestError, match="no shard of it is committed"):
        PastBuild(str(tmp_path))
