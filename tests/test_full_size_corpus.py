"""The corpus that is measured at full size is as real as it says: whole, in the config's proportions, and read."""

from pathlib import Path

import pytest

from benchmarks.full_size import extrapolated
from benchmarks.full_size_corpus import COLUMNS, FULL, SHARD, SOURCES, Unit, layout, make_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.view import query
from microdit.pipeline.upkeep.verify import verify


def test_the_full_layout_has_the_shards_of_the_issue() -> None:
    units = layout(FULL)
    assert sum(unit.rows for unit in units) == FULL
    assert sum(-(-unit.rows // SHARD) for unit in units) == 28_741


def test_a_made_corpus_can_be_asked_and_its_tables_are_whole(tmp_path: Path) -> None:
    corpus = Corpus.create(tmp_path / "corpus", "full-size", SHARD)
    for column, (scalars, _, _) in COLUMNS.items():
        corpus.declare_column(column, {"column": column}, scalars)
    fingerprints = {column: corpus.column(column).fingerprint for column in COLUMNS}
    units = [Unit(source, 0, 40) for source in SOURCES]
    for unit in units:
        fingerprints[unit.source] = corpus.declare_source(unit.source, {"units": 1}).fingerprint
        for folder in ("units", *COLUMNS):
            (tmp_path / "corpus" / "commits" / folder / unit.source).mkdir(parents=True)
            (tmp_path / "corpus" / folder / unit.source).mkdir(parents=True, exist_ok=True)
        make_unit(tmp_path / "corpus", fingerprints, unit)
    found = query(
        corpus,
        "SELECT source, count(*) AS n, count(DISTINCT id) AS ids, count(*) FILTER (status = 'ok' "
        "AND caption_source IS NOT NULL AND has_latents_sdxl_256) AS ok FROM samples GROUP BY 1",
    )
    lines = found.to_pylist()
    assert {line["source"] for line in lines} == set(SOURCES)
    assert all(line["n"] == line["ids"] == 40 and 20 <= line["ok"] <= 40 for line in lines)
    tables = ("captions/", "scores/", "commits/", "units/")
    assert [problem for problem in verify(corpus).problems if problem.what.startswith(tables)] == []


def test_figures_at_the_full_size_follow_the_slope() -> None:
    less, more = {"seconds": 2.0, "memory_gib": 1.0}, {"seconds": 5.0, "memory_gib": 0.9}
    found = extrapolated((1_000_000, less), (4_000_000, more))
    assert found["seconds"] == pytest.approx(5 + (FULL - 4_000_000) / 1e6, abs=0.1)
    assert found["memory_gib"] == 0.9  # it does not shrink
