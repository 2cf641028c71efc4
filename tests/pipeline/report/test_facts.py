"""What the report counts from commits."""

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.report.facts import rates
from tests.pipeline.helpers.report_corpus import ROWS, SHARDS, autoencoder_folder, corpus

__all__ = ["autoencoder_folder", "corpus"]


def test_time_in_which_nothing_ran_is_cut_out(corpus: Corpus) -> None:
    commits = corpus.commits("images")
    dated = [
        commits[0].model_copy(update={"attempt": "20260101T000000-00000000", "timings": {"seconds": 10.0}}),
        commits[1].model_copy(update={"attempt": "20260103T000000-00000000", "timings": {"seconds": 30.0, "cut": 7.0}}),
    ]
    work = rates({"images": dated, "captions/source": []})
    assert work.seconds == 40 and work.rate == SHARDS * ROWS / 40
    assert work.rows[0].cut == 7
    assert work.rows[0].spans == [(0.0, 40.0)]
    assert work.dates == "1 January 2026 to 3 January 2026"
