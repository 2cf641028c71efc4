"""Sources that hold models: their units are read by actors, each with one model, beside the stages of the build."""

import os
import random
import signal
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.records import Commit, UnitCommit
from microdit.pipeline.engine import retries
from microdit.pipeline.engine.build import build, carry_out
from microdit.pipeline.stages.stage import UnitTask
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.build_checks import check_adds_up, check_whole
from tests.pipeline.helpers.drawn_corpus import COUNT, build_here, config_of
from tests.pipeline.helpers.fake_stages import Pictures, open_corpus, source_words, upper_words
from tests.pipeline.helpers.fake_stages import ingest as ingest_pictures
from tests.pipeline.helpers.small_corpus import hashes
from tests.pipeline.helpers.tiny_pipelines import save_pipeline


@dataclass
class Drawn(Pictures):
    """A source of two models, of which the even units need the first one."""

    device: str = "gpu"
    at_once: int = 2
    logs: Path = Path()
    load_error: str = ""
    deadly: str = ""
    """A unit whose first reader dies."""

    def models(self) -> list[str]:
        return ["even", "odd"]

    def model_of(self, unit: str) -> int:
        return int(unit[-1]) % 2

    def load(self, model: int) -> None:
        if self.load_error:
            raise RequestError(self.load_error)
        (self.logs / f"load-{model}-{os.getpid()}-{uuid.uuid4().hex}").touch()


def ingest(corpus: Corpus, source: Drawn, task: UnitTask, report: Callable[[Commit], None]) -> UnitCommit:
    """Read a unit in a process that has loaded its model, and no other one."""
    if isinstance(source, Drawn):
        here = [path.name for path in source.logs.glob(f"load-*-{os.getpid()}-*")]
        assert [name.split("-")[1] for name in here] == [str(source.model_of(task.unit))]
        marker = source.logs / f"died-{task.unit}"
        if task.unit == source.deadly and not marker.exists():
            marker.touch()
            os._exit(9)
    return ingest_pictures(corpus, source, task, report)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.2)


def test_units_are_read_by_actors_that_load_their_model_once(cluster: None, tmp_path: Path) -> None:
    drawn = Drawn(count=5, logs=tmp_path)
    others = Pictures("others", count=2)
    sources, stages = [drawn, others], [source_words(), upper_words()]
    corpus = open_corpus(tmp_path / "corpus", sources, stages)
    notes: list[str] = []
    states: set[str] = set()

    def progress(snapshot: object) -> None:
        notes.extend(snapshot.notes)  # type: ignore[attr-defined]
        states.update(line.state for line in snapshot.lines if line.name == "ingest")  # type: ignore[attr-defined]

    summary = carry_out(corpus, sources, stages, ingest, progress=progress)  # type: ignore[arg-type]
    check_adds_up(summary)
    assert summary.exit_status == 0 and summary.units.read == 7
    assert summary.columns["captions/upper"].committed == 14
    loads = [path.name.split("-")[1] for path in tmp_path.glob("load-*")]
    assert sorted(set(loads)) == ["0", "1"] and len(loads) <= 3  # an idle one may have made room, and come back
    assert verify(corpus).problems == []


@pytest.mark.slow
def test_a_process_that_dies_of_a_unit_is_replaced(cluster: None, tmp_path: Path) -> None:
    drawn = Drawn(count=3, logs=tmp_path, deadly="pictures-000002")
    stages = [source_words(), upper_words()]
    corpus = open_corpus(tmp_path / "corpus", [drawn], stages)
    summary = carry_out(corpus, [drawn], stages, ingest)  # type: ignore[arg-type]
    assert (tmp_path / "died-pictures-000002").exists()
    assert summary.units.read == 3 and not summary.set_aside
    check_whole(corpus, shards=6)


def test_a_model_that_cannot_be_loaded_ends_the_build_with_its_message(cluster: None, tmp_path: Path) -> None:
    drawn = Drawn(logs=tmp_path, load_error="sources.pictures.makers.0.model = 'x': it cannot be loaded: no")
    corpus = open_corpus(tmp_path / "corpus", [drawn], [])
    with pytest.raises(RequestError, match=r"^sources\.pictures\.makers\.0\.model = 'x': it cannot be loaded: no$"):
        carry_out(corpus, [drawn], [], ingest)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_real_build_whose_actor_is_killed_has_the_bytes_of_an_undisturbed_one(cluster: None, tmp_path: Path) -> None:
    makers = [{"model": str(save_pipeline("sd", tmp_path / "model")), "steps": 20}]
    undisturbed = config_of(tmp_path / "undisturbed", makers, images_per_prompt=12)
    expected = hashes(build_here(undisturbed), ["images"])
    config = config_of(tmp_path / "corpus", makers, images_per_prompt=12)
    killed: list[int] = []

    def kill() -> None:
        import ray

        def drawing() -> int:
            actors = ray.util.state.list_actors(filters=[("state", "=", "ALIVE")])
            return next((int(a.pid) for a in actors if a.class_name == "SourceActor"), 0)

        for _ in range(600):
            if len(list((tmp_path / "corpus" / "commits").rglob("*.json"))) >= random.randint(1, 8) and drawing():
                killed.append(drawing())
                os.kill(killed[0], signal.SIGKILL)
                return
            threading.Event().wait(0.1)

    thread = threading.Thread(target=kill)
    thread.start()
    summary = build(config)
    thread.join()
    assert summary.columns["images"].out == 12 * COUNT
    assert hashes(Corpus.open(config.corpus), ["images"]) == expected
    print("killed", killed)
