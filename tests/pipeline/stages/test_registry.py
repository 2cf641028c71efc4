"""Sources and stages of a build: made once, declared, and run."""

from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.config.build import BuildConfig
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.engine import build as engine
from tests.pipeline.helpers.stage_outputs import config


def test_a_build_makes_its_sources_and_stages_once_and_declares_what_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.tsv").write_text("http://x/1\tone\n")
    asked = config(tmp_path / "corpus", {"captions/source": {}, "scores/basic": {}})
    options = asked.sources["photos"].model_copy(update={"list": str(tmp_path / "list.tsv")})
    asked = asked.model_copy(update={"sources": {"photos": options}})
    made: list[Any] = []

    def counted(name: str) -> None:
        make = getattr(engine, name)

        def once(config: BuildConfig, *which: str) -> Any:
            made.append(make(config, *which))
            return made[-1]

        monkeypatch.setattr(engine, name, once)

    def carry_out(corpus: Corpus, sources: Any, stages: Any, *rest: Any, **options: Any) -> str:
        assert len(made) == 2 and [made[0]] == sources and made[0] is sources[0] and made[1] is stages
        return "carried out"

    for name in ("source_of", "stages_of"):
        counted(name)
    monkeypatch.setattr(engine, "carry_out", carry_out)
    assert engine.build(asked) == "carried out"
    corpus = Corpus.open(asked.corpus)
    assert {"images", "captions/source", "scores/basic"} <= set(corpus.columns())
    assert corpus.source("photos").made_by["adapter"] == "urls"
