"""Failed rows of a shard are made again, and the others carried over into the next generation, byte for byte."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, ShardRef
from microdit.pipeline.corpus.rows import latest, read_rows
from microdit.pipeline.stages.registry import stages_of
from microdit.pipeline.stages.rows import Outcome, Output, RowFailure, open_shard
from microdit.pipeline.stages.stage import Stage, Task
from microdit.pipeline.storage import disk
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.small_corpus import replace
from tests.pipeline.helpers.stage_outputs import autoencoder, config, start

__all__ = ["autoencoder"]

KEEP = ("row", "key", "status", "reason", "detail")


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "sync", lambda path: None)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return start(tmp_path / "corpus")


def content(corpus: Corpus, commit: Commit) -> dict[int, Any]:
    """The rows of a shard: their lines without the place in the tar, and members."""
    places = ("offset", "size")
    return {
        row.row: ({name: value for name, value in row.scalars.items() if name not in places}, row.members)
        for row in read_rows(corpus, commit)
    }


def first_shard(corpus: Corpus) -> ShardRef:
    return corpus.commits("images")[0].ref


outcomes = st.sampled_from(["ok", "ok", "error", "timeout", "no_caption"])


@settings(max_examples=25, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("column", ["captions/tried", "latents/tried"])
def test_nothing_that_was_good_is_lost(
    column: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    corpus = start(tmp_path_factory.mktemp("corpus"))
    corpus.declare_column(column, {"stage": "tried"}, {"caption": "string"})
    ref = first_shard(corpus)

    def make(generation: int, said: Mapping[int, str], again: tuple[str, ...] = ()) -> list[Commit]:
        task = Task(ref, {column: generation}, again={column: again} if again else {})
        with open_shard(corpus, task, latest(corpus, "images", ref)) as shard:
            for row in shard.rows():
                outcome: Outcome = RowFailure(said[row.row], f"in {generation}")
                if said[row.row] == "ok":
                    members = {"npy": bytes([row.row, generation])} if column.startswith("latents") else {}
                    outcome = Output({"caption": f"{row.key} {generation}"}, members)
                shard.write(row, outcome)
            return shard.commit()

    said = [data.draw(st.tuples(*[outcomes] * 8)) for _ in range(3)]
    (commit,) = make(0, dict(enumerate(said[0])))
    before, rounds = content(corpus, commit), 0
    for number in (1, 2):
        again = tuple(data.draw(st.sets(st.sampled_from(["error", "timeout", "http_4xx"]), min_size=1)))
        made = make(rounds + 1, dict(enumerate(said[number])), again)
        redone = {row for row, (line, _) in before.items() if line["reason"] in again}
        good = {row for row in redone if said[number][row] == "ok"}
        assert bool(made) == bool(good)  # nothing was gained: nothing is written
        if not made:
            continue
        rounds += 1
        after = content(corpus, made[0])
        assert made[0].counts["out"] == sum(line["status"] == "ok" for line, _ in before.values()) + len(good)
        assert {row: after[row] for row in before if row not in redone} == {
            row: before[row] for row in before if row not in redone
        }
        assert {after[row][0]["reason"] or "ok" for row in redone} <= set(said[number])
        before = after
    assert not verify(corpus).problems


def test_columns_that_are_made_together_are_mended_apart(corpus: Corpus, autoencoder: str) -> None:
    """Of each column its own rows are made again, also where the tar has to be in the order of the rows."""
    latents = {"autoencoder": autoencoder, "resolution": 32}
    columns = {"latents/a": latents, "latents/b": {**latents, "resolution": 64}, "captions/source": {}}
    columns |= {"text/minilm@source": {"encoder": "minilm", "storage": "int8"}}
    stages = {stage.name: stage for stage in stages_of(config(Path(corpus.url), columns))}
    for stage in stages.values():
        for column, spec in stage.columns.items():
            corpus.declare_column(column, spec.stage, spec.scalars)
    ref = first_shard(corpus)

    def run(stage: Stage, generations: dict[str, int], **more: Any) -> dict[str, Any]:
        return {c.column: content(corpus, c) for c in stage.run(corpus, Task(ref, generations, **more))}

    run(stages["captions/source"], {"captions/source": 0})
    for stage in (stages["latents"], stages["text:minilm@source"]):
        names = list(stage.columns)
        whole = run(stage, dict.fromkeys(names, 0))
        poor = run(stage, {names[0]: 1}, aside={0: "crash", 3: "crash"})
        poor |= run(stage, dict.fromkeys(names[1:], 1), aside={3: "stall", 6: "crash"}) if names[1:] else {}
        again = {names[0]: ("crash",)} | dict.fromkeys(names[1:], ("stall",))
        mended = run(stage, dict.fromkeys(names, 2), again=again)
        assert list(mended) == names
        for name, rows in mended.items():
            redone = {0, 3} if name == names[0] else {3}
            assert {row: rows[row] for row in rows if row not in redone} == {
                row: poor[name][row] for row in rows if row not in redone
            }
            assert all(rows[row][0]["status"] == whole[name][row][0]["status"] == "ok" for row in redone)
            assert all(len(rows[row][1]) == 1 for row in redone)
    assert verify(corpus).ok  # but for the warning that the test itself made generations of fewer rows


def test_a_shard_that_is_damaged_or_stale_is_not_carried_over(corpus: Corpus) -> None:
    stage = next(iter(stages_of(config(Path(corpus.url), {"captions/source": {}}))))
    corpus.declare_column(
        "captions/source", stage.columns["captions/source"].stage, {"caption": "string", "tokens": "int32"}
    )
    ref = first_shard(corpus)
    task = Task(ref, {"captions/source": 1}, again={"captions/source": ("no_caption",)})
    (commit,) = stage.run(corpus, Task(ref, {"captions/source": 0}))
    data = corpus.store.get(commit.object.name)
    replace(corpus, commit.object.name, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"is damaged.*--repair"):
        stage.run(corpus, task)
    replace(corpus, commit.object.name, data)
    images = corpus.commits("images")[0]
    corpus.store.create(
        images.name.replace(".0.json", ".1.json"), images.model_copy(update={"generation": 1}).to_bytes()
    )
    with pytest.raises(ValueError, match=r"its inputs have been made again.*--repair"):
        stage.run(corpus, task)
