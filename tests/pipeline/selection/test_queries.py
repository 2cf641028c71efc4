"""The named queries: where they are listed, what they need, and what they leave out."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.cli.choose import select as command
from microdit.pipeline.curation.duplicates import decontaminate, dedup
from microdit.pipeline.selection.queries import named_queries, parse
from microdit.pipeline.selection.selections import select
from tests.pipeline.helpers.scored_corpus import chosen, make


def test_named_queries_are_told_where_they_are_looked_for(tmp_path: Path) -> None:
    known = named_queries()
    assert [query.name for query in known] == ["clean", "drawn", "paper", "paper-512", "synthetic-only"]
    for named in known:
        assert named.about.endswith(".") and "--" not in named.about and named.sql.startswith("SELECT")
        assert parse(named.sql).unsteady() is None and parse(named.sql).conditions() is not None
        assert f"`{named.name}`" in str(command.__doc__)
    corpus = make(tmp_path, [("a", 2)])
    with pytest.raises(RequestError, match=r"no query named 'cleen'; give SQL .*(\n  [\w-]+: .+){5}$"):
        select(corpus, "cleen")


def test_the_papers_data(tmp_path: Path) -> None:
    corpus = make(tmp_path, [(name, 4) for name in ("sa1b", "cc12m", "textcaps", "journeydb", "diffusiondb", "mine")])
    large = [0, 2, 3]
    safe = [0, 2]  # row 1 is small, row 3 scored 0.3
    others = dict.fromkeys(("sa1b", "cc12m", "textcaps", "journeydb"), large)
    assert chosen(corpus, "paper") == others | {"diffusiondb": safe}
    assert chosen(corpus, "paper-512") == {name: rows for name, rows in others.items() if name != "cc12m"}
    assert chosen(corpus, "synthetic-only") == {"journeydb": [0, 1, 2, 3], "diffusiondb": [0, 1, 2, 3]}


def test_clean_says_what_it_needs_and_leaves_out_what_it_says(tmp_path: Path) -> None:
    bare = make(tmp_path / "bare", [("a", 3)], columns=["scores/basic"])
    with pytest.raises(RequestError) as told:
        select(bare, "clean")
    text = str(told.value)
    assert "contaminated: from `microdit decontaminate`, run again whenever the corpus has changed" in text
    assert "duplicate_keep: from `microdit dedup`" in text
    assert "nsfw: from `scores/nsfw` in the config of the corpus, and `microdit build`" in text
    assert "text_area: from `scores/text` in the config" in text

    corpus = make(tmp_path / "corpus", [("a", 11), ("b", 1)])
    dedup(corpus, 0)
    evaluation = pa.table({"key": ["coco/7"], "pixels_sha256": ["f" * 64], "phash": [f"{77:016x}"]})
    pq.write_table(evaluation, tmp_path / "coco.parquet")
    decontaminate(corpus, [str(tmp_path / "coco.parquet")], 0)
    assert chosen(corpus, "clean") == {"a": [0, 9, 10]}  # b's one row is a's first
    columns = select(corpus, "clean").columns
    assert sorted(columns) == ["images", "scores/basic", "scores/nsfw", "scores/text"]
