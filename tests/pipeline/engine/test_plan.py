"""What is to be done, from listings alone."""

from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.failures import failures, read_failure, write_failure
from microdit.pipeline.engine import cluster
from microdit.pipeline.engine.layout import Layout
from microdit.pipeline.engine.plan import Job, Plan, UnitJob
from microdit.pipeline.stages.stage import UnitTask
from tests.pipeline.helpers.fake_stages import Pictures, ingest, open_corpus, source_words, upper_words

SOURCE = Pictures(count=2)
UNITS = {SOURCE.name: SOURCE.units()}
STAGES = [source_words(), upper_words()]
SHARDS = ["pictures-000000-00", "pictures-000000-01", "pictures-000001-00", "pictures-000001-01"]


def corpus_with(tmp_path: Path, units: int):
    corpus = open_corpus(tmp_path / "corpus", [SOURCE], STAGES)
    for unit in SOURCE.units()[:units]:
        ingest(corpus, SOURCE, UnitTask(unit), lambda message: None)
    return corpus


def drain(plan: Plan, stage: int) -> list[Job]:
    return list(iter(lambda: plan.take(stage), None))


def test_a_new_corpus_has_units_to_read_and_nothing_else(tmp_path: Path) -> None:
    plan = Plan(corpus_with(tmp_path, 0), UNITS, STAGES)
    assert set(plan.units) == {UnitJob("pictures", unit) for unit in SOURCE.units()}
    assert drain(plan, 0) == drain(plan, 1) == []
    assert not plan.empty()


def test_a_shard_moves_on_as_soon_as_it_is_committed(tmp_path: Path) -> None:
    plan = Plan(corpus_with(tmp_path, 0), UNITS, STAGES)
    assert plan.committed("pictures", SHARDS[0], "images")
    assert not plan.committed("pictures", SHARDS[0], "images")  # told twice, it counts once
    (job,) = drain(plan, 0)
    assert (job.shard, job.columns, job.ref.unit) == (SHARDS[0], {"captions/source": 0}, "pictures-000000")
    assert drain(plan, 1) == []
    plan.committed("pictures", SHARDS[0], "captions/source")
    plan.release(job)
    (job,) = drain(plan, 1)
    assert job.columns == {"captions/upper": 0, "captions/lower": 0}


def test_listings_say_what_is_left(tmp_path: Path) -> None:
    corpus = corpus_with(tmp_path, 1)
    captions, upper = STAGES
    for shard in SHARDS[:2]:
        captions.write(corpus, Job(0, "pictures", shard, {}).ref, "captions/source")
    upper.write(corpus, Job(1, "pictures", SHARDS[0], {}).ref, "captions/upper")
    plan = Plan(corpus, UNITS, STAGES)
    assert list(plan.units) == [UnitJob("pictures", "pictures-000001")]
    assert (plan.units_done, plan.units_total, plan.shards) == (1, 2, 2)
    assert drain(plan, 0) == []
    assert {(job.shard, tuple(job.columns)) for job in drain(plan, 1)} == {
        (SHARDS[0], ("captions/lower",)),
        (SHARDS[1], ("captions/upper", "captions/lower")),
    }


def test_columns_restrict(tmp_path: Path) -> None:
    corpus = corpus_with(tmp_path, 1)
    images = Plan(corpus, UNITS, STAGES, ["images"])
    assert len(images.units) == 1
    assert drain(images, 0) == []
    upper = Plan(corpus, UNITS, STAGES, ["captions/upper"])
    assert upper.empty()  # its input is not there, and is not asked for
    with pytest.raises(RequestError, match=r"'captions/none'.*captions/source"):
        Plan(corpus, UNITS, STAGES, ["captions/none"])


def test_what_is_set_aside_stays_so_until_it_is_retried_or_made(tmp_path: Path) -> None:
    corpus = corpus_with(tmp_path, 1)
    plan = Plan(corpus, UNITS, STAGES)
    first, second = sorted(drain(plan, 0), key=lambda job: job.shard)
    assert plan.set_aside(first) == ("captions/source",)
    what = {"stage": "source words", "attempts": 3, "message": "no", "traceback": "..."}
    write_failure(corpus, "captions/source", "pictures", first.shard, **what)
    write_failure(corpus, "captions/source", "pictures", first.shard, **what)
    write_failure(corpus, "units", "pictures", "pictures-000001", **what)
    assert failures(corpus, "captions/source") == {("pictures", first.shard): 1}
    assert failures(corpus, "captions/sourc") == {}
    assert read_failure(corpus, "captions/source", "pictures", first.shard, 1).message == "no"

    again = Plan(corpus, UNITS, STAGES)
    assert drain(again, 0) == [second]
    assert not again.units
    retried = Plan(corpus, UNITS, STAGES, retry_failed=True)
    assert set(drain(retried, 0)) == {first, second}
    assert len(retried.units) == 1
    STAGES[0].write(corpus, first.ref, "captions/source")
    assert Plan(corpus, UNITS, STAGES).aside["captions/source"] == set()


def test_a_shard_that_is_handed_out_again_asks_for_what_is_still_missing(tmp_path: Path) -> None:
    plan = Plan(corpus_with(tmp_path, 0), UNITS, STAGES)
    plan.committed("pictures", SHARDS[0], "images")
    plan.committed("pictures", SHARDS[0], "captions/source")
    job = plan.take(1)
    assert job is not None
    plan.committed("pictures", SHARDS[0], "captions/upper")
    plan.requeue(job)
    (again,) = drain(plan, 1)
    assert again.columns == {"captions/lower": 0}
    assert again == job  # the same work: its attempts are counted together


def test_downstream_goes_first() -> None:
    class Nothing:
        committed = staticmethod(lambda column, source: {})

    plan = Plan(Nothing(), {}, STAGES)  # type: ignore[arg-type]
    assert plan.downstream_first() == [1, 0]
    assert (plan.upstream(0), plan.upstream(1)) == (set(), {0})


@pytest.mark.parametrize("models", [0, 1, 3, 7])
@pytest.mark.parametrize("on_cpus", [0, 1, 5])
@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (2, 0), (3, 0), (8, 0), (64, 0), (8, 1), (32, 8), (4, 8), (2, 1)])
def test_every_kind_of_work_can_always_run(cpus: float, gpus: float, models: int, on_cpus: int) -> None:
    """All that ingest and models can hold leaves room for a task, so nobody waits for ever."""
    layout = Layout.for_cluster(cpus, gpus, models, on_cpus)
    kinds = [layout.models(kind) for kind, count in (("gpu", models), ("cpu", on_cpus)) if count]
    held = layout.ingests * layout.ingest_cpu + sum(kind.count * kind.cpu for kind in kinds)
    assert held + layout.task_cpu <= cpus
    assert layout.gpu_models.count >= (models if not gpus else 1)
    assert layout.gpu_models.count * layout.gpu_models.gpu <= gpus
    assert layout.cpu_models.count >= on_cpus and not layout.cpu_models.gpu
    assert min(layout.ingest_cpu, layout.task_cpu, *(kind.cpu for kind in kinds)) > 0


def test_models_on_cpus_may_use_all_of_them() -> None:
    """They ask for no more than their share, and are yet as many as there are CPUs."""
    alone = Layout.for_cluster(64, 0, 0, 1).models("cpu")
    assert (alone.per_stage, alone.count, alone.cpu) == (64, 64, 0.5)
    beside = Layout.for_cluster(64, 8, 2, 2).models("cpu")
    assert (beside.per_stage, beside.count, beside.cpu) == (32, 64, 0.25)
    assert Layout.for_cluster(64, 8, 2, 2).models("gpu").cpu == 1
    assert Layout.for_cluster(64, 0, 2, 2).models("gpu").per_stage == 8  # those that want a GPU have their part only
    assert Layout.for_cluster(2, 0, 1).models("gpu").count == 1
    assert Layout.for_cluster(64, 0, 0, 1, cpus_per_actor=4).models("cpu").per_stage == 16


def test_a_cluster_that_may_grow_is_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 4.0})
    assert [cluster.all_cpus(most) for most in (None, 100, 6)] == [4, 8, 6]  # twice as many at a time
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {})
    assert cluster.all_cpus(None) == 1  # a head without CPUs: what cannot start is the demand


def test_what_is_made_again_takes_with_it_what_comes_from_it(tmp_path: Path) -> None:
    corpus = corpus_with(tmp_path, 2)
    for shard in SHARDS:
        STAGES[0].write(corpus, Job(0, "pictures", shard, {}).ref, "captions/source")
        STAGES[1].write(corpus, Job(1, "pictures", shard, {}).ref, "captions/upper")
    whole = Plan(corpus, UNITS, STAGES, ["images", "captions/source", "captions/upper"])
    assert whole.empty()
    redo = {
        "images": {("pictures", SHARDS[1])},
        "captions/source": {("pictures", SHARDS[2])},
        "captions/none": {("pictures", SHARDS[3])},
        "units": {("elsewhere", "elsewhere-000000")},
    }
    what = {"stage": "source words", "attempts": 3, "message": "long ago", "traceback": ""}
    write_failure(corpus, "captions/source", "pictures", SHARDS[2], **what)
    plan = Plan(corpus, UNITS, STAGES, redo=redo)
    (unit,) = plan.units
    assert (unit.unit, unit.redo, unit.generation) == ("pictures-000000", {SHARDS[1]: 1}, 0)
    assert (plan.units_done, plan.done["images"], plan.shards) == (1, 3, 4)
    (job,) = drain(plan, 0)
    assert (job.shard, job.columns) == (SHARDS[2], {"captions/source": 1})
    assert {(job.shard, tuple(job.columns.items())) for job in drain(plan, 1)} == {
        (SHARDS[0], (("captions/lower", 0),)),
        (SHARDS[3], (("captions/lower", 0),)),
    }
    plan.committed("pictures", SHARDS[1], "images")
    (job,) = drain(plan, 0)
    assert (job.shard, job.columns) == (SHARDS[1], {"captions/source": 1})
    plan.committed("pictures", SHARDS[1], "captions/source")
    (job,) = drain(plan, 1)
    assert (job.shard, job.columns) == (SHARDS[1], {"captions/upper": 1, "captions/lower": 0})


def test_rows_that_are_made_again_take_what_comes_from_them_only_if_they_change(tmp_path: Path) -> None:
    corpus = corpus_with(tmp_path, 1)
    columns = ["images", "captions/source", "captions/upper"]
    for shard in SHARDS[:2]:
        STAGES[0].write(corpus, Job(0, "pictures", shard, {}).ref, "captions/source")
        STAGES[1].write(corpus, Job(1, "pictures", shard, {}).ref, "captions/upper")
    units = {"pictures": UNITS["pictures"][:1]}
    shards = {("pictures", shard) for shard in SHARDS[:2]}
    rows = {"captions/source": shards, "captions/upper": {("pictures", SHARDS[0])}}
    plan = Plan(corpus, units, STAGES, columns, rows=rows, reasons=["error"])
    jobs = {job.shard: job for job in drain(plan, 0)}
    assert {shard: job.columns for shard, job in jobs.items()} == {key: {"captions/source": 1} for key in SHARDS[:2]}
    assert all(job.again == {"captions/source": ("error",)} for job in jobs.values())
    assert drain(plan, 1) == [] and plan.done["captions/upper"] == 1  # it waits, or stays

    plan.unchanged("pictures", SHARDS[0], "captions/source")
    (job,) = drain(plan, 1)
    assert (job.shard, job.columns, job.again) == (SHARDS[0], {"captions/upper": 1}, {"captions/upper": ("error",)})
    plan.committed("pictures", SHARDS[1], "captions/source")
    (job,) = drain(plan, 1)
    assert (job.shard, job.columns, job.again) == (SHARDS[1], {"captions/upper": 1}, {})  # as a whole
    plan.committed("pictures", SHARDS[1], "captions/upper")
    assert plan.done == {"images": 2, "captions/source": 2, "captions/upper": 1}

    plan = Plan(corpus, units, STAGES, columns, rows=rows, reasons=["error"])
    drain(plan, 0)
    plan.committed("pictures", SHARDS[0], "captions/source")  # it has changed: of what comes from it, nothing is kept
    (job,) = drain(plan, 1)
    assert (job.shard, job.columns, job.again) == (SHARDS[0], {"captions/upper": 1}, {})


def test_units_of_a_source_that_waits_are_passed_over(tmp_path: Path) -> None:
    plan = Plan(open_corpus(tmp_path, [Pictures()], STAGES), {"a": ["a-000000"], "b": ["b-000000"]}, STAGES)
    taken = plan.take_unit(lambda unit: unit.source == "b")
    assert taken is not None and taken.unit == "b-000000"
    assert plan.take_unit(lambda unit: unit.source == "b") is None
    plan.leave("a")
    assert plan.empty() and (plan.units_total, plan.units_done) == (2, 0)
