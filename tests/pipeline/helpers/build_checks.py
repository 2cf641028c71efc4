"""Checks of what a build of the fake stages has made."""

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.engine.summary import BuildSummary
from tests.pipeline.helpers.fake_stages import ROWS

MADE = ("captions/source", "captions/upper", "captions/lower")


def check_whole(corpus: Corpus, shards: int) -> None:
    """Every column has every shard once, and in = out + failed."""
    for column in ("images", *MADE):
        found = corpus.commits(column)
        assert len(found) == shards
        assert {commit.generation for commit in found} == {0}
        for commit in found:
            assert commit.counts == {"in": ROWS, "out": ROWS - 1, "failed": 1}


def check_adds_up(summary: BuildSummary) -> None:
    for column in summary.columns.values():
        assert column.shards == column.committed + column.set_aside + column.waiting
        assert column.inputs == column.out + column.failed
        assert sum(column.reasons.values()) == column.failed
