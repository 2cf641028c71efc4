"""A source that is gone after ingest: what is committed of it needs it no more."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.config.captions import CaptionsColumn
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import IMAGES
from microdit.pipeline.engine.build import build
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.captions.given import GivenCaptions
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare, stages_of
from microdit.pipeline.stages.stage import UnitTask
from microdit.pipeline.tables.joins.lookup import Joined
from tests.pipeline.helpers.archives import made_tar


def _config(tmp_path: Path, source: dict[str, Any]) -> BuildConfig:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/list.tsv").write_text("http://127.0.0.1:9/a.jpg\tone\nhttp://127.0.0.1:9/b.jpg\ttwo\n")
    for name in ("one.tar", "two.tar"):
        (tmp_path / "data" / name).write_bytes(made_tar({"a.jpg": b"no picture", "a.txt": b"one"}))
    return BuildConfig.model_validate(
        {"name": "c", "corpus": str(tmp_path / "corpus"), "sources": {"gone": source}, "columns": {}}
    )


OPTIONS = {"urls": {"list": "data/list.tsv", "unit_inputs": 1}, "webdataset": {"files": "data/*.tar"}}


def _ingested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, units: int) -> BuildConfig:
    """Read so many of the source's two units, then remove its files."""
    monkeypatch.chdir(tmp_path)
    config = _config(tmp_path, {"adapter": adapter, **OPTIONS[adapter]})
    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    [source] = sources_of(config)
    declare(corpus, config, [source], [])
    with source.running(corpus, print):
        for unit in source.units()[:units]:
            ingest_unit(corpus, source, UnitTask(unit), config)
    shutil.rmtree(tmp_path / "data")
    return config


@pytest.mark.parametrize("adapter", OPTIONS)
def test_a_source_may_be_gone_once_all_is_committed(
    tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _ingested(tmp_path, monkeypatch, adapter, units=2)
    notes: list[str] = []
    for columns in (None, [], [IMAGES]):
        summary = build(config, columns, progress=lambda snapshot: notes.extend(snapshot.notes))
        assert (summary.worked, summary.units.read, summary.set_aside) == (False, 2, [])
    assert all("source gone cannot be used" in note and "what is committed of it is" in note for note in notes)
    assert len(notes) == 3


@pytest.mark.parametrize("adapter", OPTIONS)
def test_a_source_that_is_gone_is_needed_for_units_that_are_not_read(
    tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _ingested(tmp_path, monkeypatch, adapter, units=1)
    with pytest.raises(
        RequestError, match=r"(no file matches|cannot be read) .*1 units of source gone are not read yet.*`--columns`"
    ):
        build(config)
    assert not build(config, []).worked  # as the message says


def test_a_captions_table_may_be_gone_once_the_corpus_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _ingested(tmp_path, monkeypatch, "webdataset", units=2)
    (tmp_path / "captions.jsonl").write_text('{"url": "gone/one.tar/a.jpg", "caption": "told"}\n')
    columns: dict[str, Any] = {"captions/told": {"join": "captions.jsonl"}}
    config = BuildConfig.model_validate(config.model_dump(mode="json") | {"columns": columns})
    with pytest.raises(RequestError, match="no file matches"):
        build(config.model_copy(update={"columns": {"captions/told": CaptionsColumn(join="other.jsonl")}}), [])
    build(config, [])
    (tmp_path / "captions.jsonl").unlink()
    assert not build(config, []).worked
    [stage] = stages_of(config, Corpus.open(config.corpus))
    assert isinstance(stage, GivenCaptions) and stage.table is not None
    assert Joined(Corpus.open(config.corpus).store, stage.table).get("gone/one.tar/a.jpg") == {"caption": "told"}
