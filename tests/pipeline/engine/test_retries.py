"""What becomes of a job that failed, and how the sample that kills is found."""

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.engine.messages import ErrorReport
from microdit.pipeline.engine.plan import Job, UnitJob
from microdit.pipeline.engine.retries import BACKOFF_SECONDS, MAX_ASIDE, MAX_LOST, MAX_REJECTED, Retries, Search

JOB = Job(0, "pictures", "pictures-000000-00", {"captions/a": 0})
UNIT = UnitJob("pictures", "pictures-000000")
ERROR = ErrorReport("no", "...")


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 64])
def test_the_row_that_kills_is_found_by_halves(rows: int) -> None:
    for killer in range(rows):
        search, trials, found = Search(rows), 0, None
        while found is None:
            trials += 1
            if killer in search.trial:
                found = search.died()
            else:
                assert search.survived()
        assert found == killer
        assert trials <= 2 + rows.bit_length()


def test_a_row_is_blamed_only_if_it_killed_alone() -> None:
    """Two rows that kill together and none alone, as when memory runs out."""
    search, trials = Search(8), 0
    while True:
        trials += 1
        if {2, 3} <= set(search.trial):
            assert search.died() is None
        elif not search.survived():
            break
    assert trials <= 6


def test_attempts_are_further_apart_each_time_and_then_end() -> None:
    retries = Retries(3, 8)
    waits = [retries.raised(JOB, ERROR, "node-1") for _ in range(3)]
    assert waits == [BACKOFF_SECONDS, 4 * BACKOFF_SECONDS, None]
    assert retries.of(JOB).nodes == {"node-1"}
    assert retries.done(JOB).attempts == 3
    assert retries.raised(JOB, ERROR, None) == BACKOFF_SECONDS  # a new life


def simulate(retries: Retries, killers: dict[int, str], stage_dies: bool = False) -> tuple[int, bool]:
    """Work on JOB until it is done or set aside: how often, and whether it was done."""
    for calls in range(1, 1000):
        task = retries.task(JOB)
        rows = set(range(8) if task.rows is None else task.rows) - task.aside.keys()
        deadly = [killers[row] for row in sorted(rows & killers.keys())]
        if stage_dies or deadly:
            wait = retries.died(JOB, deadly[0] if deadly else "crash", ERROR, None)
        elif task.rows is None:
            return calls, True
        else:
            wait = retries.survived(JOB)
        if wait is None:
            return calls, False
    raise AssertionError("it goes round for ever")


def test_rows_that_kill_are_set_aside_and_the_rest_is_done() -> None:
    retries = Retries(3, 8)
    calls, done = simulate(retries, {1: "crash", 6: "stall"})
    assert done
    assert retries.done(JOB).aside == {1: "crash", 6: "stall"}
    assert calls <= 2 + 5 + 1 + 5 + 1  # twice by chance, a search, once more, a search, and the end


def test_a_stage_that_dies_without_a_sample_is_no_samples_fault() -> None:
    retries = Retries(3, 8)
    assert simulate(retries, {}, stage_dies=True) == (3, False)
    assert retries.of(JOB).aside == {}


def test_a_shard_of_nothing_but_killers_ends() -> None:
    retries = Retries(3, 64)
    calls, done = simulate(retries, dict.fromkeys(range(64), "crash"))
    assert not done or calls < 8 * MAX_ASIDE


def test_a_process_that_died_by_chance_costs_an_attempt() -> None:
    """What kills processes from outside is no fault of the shard: the search survives everywhere."""
    retries = Retries(3, 8)
    assert retries.died(JOB, "crash", ERROR, None) == BACKOFF_SECONDS
    assert retries.died(JOB, "crash", ERROR, None) == 0.0
    while (search := retries.of(JOB).search) is not None:
        assert len(search.trial) <= 8
        assert retries.survived(JOB) is not None
    assert retries.task(JOB).rows is None
    assert retries.done(JOB).aside == {}


def test_an_error_in_a_trial_is_no_death() -> None:
    retries = Retries(2, 8)
    assert retries.died(JOB, "crash", ERROR, None) is not None
    assert retries.died(JOB, "crash", ERROR, None) == 0.0
    assert retries.task(JOB).rows == range(0)
    assert retries.raised(JOB, ERROR, None) == 0.0
    assert retries.task(JOB).rows == range(4)


def test_a_lost_node_is_no_attempt_but_not_for_ever() -> None:
    retries = Retries(1, 8)
    waits = [retries.lost(JOB, ERROR, f"node-{i}") for i in range(MAX_LOST + 1)]
    assert waits == [BACKOFF_SECONDS] * MAX_LOST + [None]
    assert retries.of(JOB).attempts == 0


def test_a_unit_that_killed_its_process_is_decoded_in_isolation() -> None:
    retries = Retries(3, 8)
    assert not retries.unit_task(UNIT).isolated
    assert retries.died(UNIT, "crash", ERROR, None) == BACKOFF_SECONDS
    assert retries.unit_task(UNIT).isolated
    assert retries.died(UNIT, "crash", ERROR, None) == 4 * BACKOFF_SECONDS
    assert retries.died(UNIT, "crash", ERROR, None) is None


def test_a_server_that_rejects_several_shards_in_a_row_ends_the_build() -> None:
    retries, rejects = Retries(3, 8), ErrorReport("endpoint x: 4 requests rejected", "...", server_rejects=True)
    jobs = [Job(0, "pictures", f"pictures-000000-{n:02}", {"captions/a": 0}) for n in range(MAX_REJECTED)]
    for _ in range(5):
        retries.answered(jobs[0], rejects)  # one shard, however often
    for job in jobs[:-1]:
        retries.answered(job, rejects)
    retries.answered(jobs[-1], ERROR)  # says nothing of the server
    retries.answered(jobs[-1], None)
    for job in jobs[:-1]:
        retries.answered(job, rejects)
    with pytest.raises(RequestError, match="x: 4 requests rejected; so it was with 3 shards in a row"):
        retries.answered(jobs[-1], rejects)
