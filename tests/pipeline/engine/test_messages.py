"""Messages between workers and driver, and what the driver reads from an error of Ray."""

import pickle
import time

import pytest
import ray

from microdit.pipeline.base.errors import DamagedError, RequestError, UnreadableError
from microdit.pipeline.engine import cluster
from microdit.pipeline.engine.board import Board
from microdit.pipeline.engine.deaths import explain_death
from microdit.pipeline.engine.messages import ErrorReport, ShardEnded, ShardWork, UnitIngested
from microdit.pipeline.engine.plan import Job
from microdit.pipeline.engine.summary import BuildSummary, ColumnSummary, UnitCounts
from microdit.pipeline.engine.workers import error_report


def test_messages_survive_pickling() -> None:
    work = ShardWork(inputs=3, failed=1, bytes=4000, seconds=2.0, encode_seconds=1.5)
    for message in (
        ShardEnded({"captions/a": work}, ("captions/b",), ErrorReport("no", "...")),
        UnitIngested(("a", "b")),
    ):
        assert pickle.loads(pickle.dumps(message)) == message


def test_an_error_without_a_text_has_its_types_name() -> None:
    for error in (ValueError(), RequestError(""), UnreadableError(" \n"), DamagedError()):
        assert error_report(error).message == type(error).__name__


def test_seconds_of_a_model_are_those_of_the_whole_where_they_are_not_measured() -> None:
    assert ShardWork(3, 1, 4000, seconds=2.0).busy_seconds == 2.0
    assert ShardWork(3, 1, 4000, seconds=2.0, encode_seconds=1.5).busy_seconds == 1.5


def test_captions_that_a_model_reads_by_their_beginning_are_in_the_summary() -> None:
    board = Board(["clip"], None)
    for cut in (3, 0, 2000):
        work = ShardWork(inputs=3000, failed=0, bytes=4000, seconds=2.0, cut=cut)
        board.written(Job(0, "source", "shard", {}), {"scores/clip": work})
    assert board.work["scores/clip"].cut == 2003
    column = ColumnSummary(3, 3, 3, 0, 0, 9000, 9000, 0, {}, 6.0, None, cut=2003)
    summary = BuildSummary("corpus", 6.0, True, UnitCounts(1, 1, 0), {"scores/clip": column})
    assert "scores/clip: 2,003 captions of this run have more tokens than the model reads" in summary.text()
    assert summary.to_dict()["columns"]["scores/clip"]["cut"] == 2003


@pytest.mark.parametrize(
    ("error", "message", "is_request"),
    [
        (RequestError("field x: no"), "field x: no", True),
        (DamagedError("a commit is torn"), "a commit is torn", False),
        (ValueError("odd"), "ValueError: odd", False),
        (KeyError(), "KeyError", False),
    ],
)
def test_only_a_wrong_request_ends_the_build(error: Exception, message: str, is_request: bool) -> None:
    report = error_report(error)
    assert (report.message, report.is_request, report.full_disk_of) == (message, is_request, None)
    if is_request:
        with pytest.raises(RequestError, match=message):
            report.raise_if_request()
    else:
        report.raise_if_request()


def test_a_death_is_explained_by_its_error_its_node_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "is_alive", lambda node: node == "here")
    died, now = ray.exceptions.WorkerCrashedError(), time.monotonic()
    assert explain_death(died, "here", now, 60.0).cause == "crash"
    assert explain_death(died, "here", now - 31.0, 60.0).cause == "stall"
    assert explain_death(died, None, None, 60.0).cause == "crash"
    lost = explain_death(died, "elsewhere", now - 31.0, 60.0)
    assert (lost.cause, lost.node_gone) == ("lost", True)
    memory = explain_death(ray.exceptions.OutOfMemoryError("full"), "here", now, 60.0)
    assert (memory.cause, memory.node_gone) == ("lost", False)
