"""A source that is gone after ingest: what is committed of it needs it no more."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.engine.build import build
from microdit.pipeline.sources.registry import sources_of
from microdit.pipeline.stages.ingest import ingest_unit
from microdit.pipeline.stages.registry import declare
from microdit.pipeline.stages.stage import UnitTask
from tests.pipeline.helpers.archives import made_tar


def _config(tmp_path: Path, source: dict[str, Any]) -> BuildConfig:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/list.tsv").write_text("http://127.0.0.1:9/a.jpg\tone\n")
    (tmp_path / "data/one.tar").write_bytes(made_tar({"a.jpg": b"no picture", "a.txt": b"one"}))
    return BuildConfig.model_validate(
        {"name": "c", "corpus": str(tmp_path / "corpus"), "sources": {"gone": source}, "columns": {}}
    )


@pytest.mark.parametrize("adapter", ["urls", "webdataset"])
def test_a_source_may_be_gone_once_all_is_committed(tmp_path: Path, adapter: str) -> None:
    options = {"urls": {"list": f"{tmp_path}/data/list.tsv"}, "webdataset": {"files": f"{tmp_path}/data/*.tar"}}
    config = _config(tmp_path, {"adapter": adapter, **options[adapter]})
    corpus = Corpus.create(config.corpus, config.name, config.shard_samples)
    sources = sources_of(config)
    declare(corpus, config, sources, [])
    ingest_unit(corpus, sources[0], UnitTask("gone-000000"), config)
    shutil.rmtree(tmp_path / "data")
    assert not build(config, []).worked  # nothing of it is to be read
    with pytest.raises(RequestError, match=r"(no file matches|cannot be read) .*`--columns` with the columns to make"):
        build(config)  # the path may as well be mistyped
