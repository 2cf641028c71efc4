"""Rows that an earlier generation had, and the newest has not, are named by `verify` as a warning."""

from pathlib import Path

import pytest

from microdit.pipeline.cli.shown_verify import print_verification
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.small_corpus import REF, fill, make_corpus, write_images


def test_rows_that_a_repair_lost_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    first = corpus.commit("images", REF.source, REF.shard, 0)
    second = write_images(corpus, REF, failed=(0, 1, 2), generation=1)
    found = verify(corpus)
    assert found.ok and [(problem.kind, problem.what) for problem in found.problems] == [("fewer", second.name)]
    assert found.problems[0].detail == (
        f"shard {REF.shard}: generation 1 has 3 good rows, generation 0 had 5, and its object {first.object.name} is "
        "still there"
    )
    print_verification(found)
    assert capsys.readouterr().out.endswith(": 0 problems and 1 warnings\n")
    write_images(corpus, REF, generation=2)  # as many as at first
    assert verify(corpus).problems == []
    write_images(corpus, REF, failed=(0, 1, 2), generation=3)
    corpus.store.delete([first.object.name, corpus.commit("images", REF.source, REF.shard, 2).object.name])
    assert verify(corpus).problems == []
