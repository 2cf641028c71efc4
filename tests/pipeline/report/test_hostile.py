"""A page of a corpus with a stranger's selections, and with objects that are lost."""

import json
from pathlib import Path

import pytest

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.report import selection_funnel
from microdit.pipeline.report.facts import complete_samples
from microdit.pipeline.report.filters import filters
from microdit.pipeline.report.page import gather
from microdit.pipeline.report.sample_view import open_samples
from microdit.pipeline.selection.selections import select
from microdit.pipeline.selection.view import query
from microdit.pipeline.tables.sample_table import TableField, table_fields
from tests.pipeline.helpers.scored_corpus import make
from tests.pipeline.helpers.small_corpus import REF, SOURCE, fill, latents, make_corpus, replace

COLUMNS = ("captions/source", "latents/demo-64")


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    made = make_corpus(tmp_path / "corpus")
    fill(made, columns=COLUMNS)
    return made


@pytest.mark.parametrize(
    "condition",
    ["levenshtein(repeat('ab', 200000), repeat(id, 20000)) > 1", "(SELECT count(*) FROM range(1000000000000)) > row"],
)
def test_a_selection_that_takes_too_long_gets_a_note(
    small: Corpus, condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection_funnel, "MOST_SECONDS", 3.0)
    chosen = select(small, "hostile", "SELECT source, shard, row FROM samples WHERE status = 'ok'")
    hostile = selection_funnel.Selection(
        "hostile", chosen.hash, chosen.path, chosen.rows, f"SELECT * FROM samples WHERE {condition}", chosen.columns
    )
    monkeypatch.setattr("microdit.pipeline.report.page.newest_selections", lambda corpus: [hostile])
    (funnel,) = gather(small, None).curation.funnels
    assert funnel.problem is not None and "was stopped, because it takes more than" in funnel.problem
    assert funnel.steps[-1].label in ("kept", "selected")


def test_a_reason_that_no_row_has_is_counted_all_the_same(small: Corpus) -> None:
    for column in ("images", "captions/source"):
        commit = small.commit(column, SOURCE, REF.shard, 0)
        about = json.loads(small.store.get(commit.name)) | {"reasons": {"invented": 1}}
        replace(small, commit.name, json.dumps(about).encode())
    steps = gather(small, None).steps
    drops = {(drop.column, drop.reason): drop for step in steps for drop in step.drops}
    assert drops["images", "invented"].count == drops["captions/source", "invented"].count == 1
    assert drops["images", "invented"].example == drops["captions/source", "invented"].example == ""


@pytest.mark.parametrize("what", ["tar", "sidecar of latents", "captions", "sidecar of images"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_lost_object_costs_a_note(small: Corpus, what: str, cached: bool) -> None:
    if cached:
        query(small, "SELECT * FROM samples")
    images = small.commit("images", SOURCE, REF.shard, 0)
    lost = {
        "tar": images.object.name,
        "sidecar of latents": latents(small).sidecar.name,
        "captions": small.commit("captions/source", SOURCE, REF.shard, 0).object.name,
        "sidecar of images": images.sidecar.name,
    }[what]
    replace(small, lost, None)
    page = gather(small, None)
    if not (cached and what == "captions"):  # of captions the table has all
        assert page.notes and all(REF.shard in note for note in page.notes)
    assert page.listed == 12 and page.pictures.samples
    if not cached and what != "tar":
        assert page.steps[-1].count == 5, "the other shard"
        with pytest.raises(ValueError, match=r"is missing or damaged .*run `microdit verify`, then `microdit build"):
            query(small, "SELECT * FROM samples")


def test_filters_leave_as_many_as_the_query_chooses(tmp_path: Path) -> None:
    from microdit.pipeline.curation.duplicates import decontaminate, dedup

    made = make(tmp_path / "corpus", [("a", 12)])
    other = make(tmp_path / "other", [("b", 12)], columns=("scores/basic",))
    dedup(made)
    decontaminate(made, [other.url])
    sql = (
        "SELECT source, shard, row FROM samples WHERE status = 'ok' AND duplicate_keep IS NOT NULL AND nsfw <= 0.2 AND "
        "text_area <= 0.1 AND least(width, height) >= 256 AND greatest(width, height) <= 3 * least(width, height) AND "
        "basic_sharpness >= 20 AND NOT contaminated QUALIFY one_per_group(duplicate_group)"
    )
    with open_samples(made, {name: made.commits(name) for name in made.columns()}, []) as view:
        columns = {row["column_name"] for row in view.rows("DESCRIBE samples")}
        shown = filters(view, columns)
    assert shown.total - shown.dropped == query(made, sql).num_rows
    for one in shown.rows:
        without = sql
        for text in (f" AND {one.condition}", f"{one.condition} AND ", f" QUALIFY {one.condition}"):
            without = without.replace(text, "")
        if without != sql:
            assert one.alone == query(made, without).num_rows - query(made, sql).num_rows


def test_presence_is_asked_of_small_columns(small: Corpus) -> None:
    fields: list[TableField] = table_fields(small.columns())
    assert complete_samples(fields, ["captions/source", "scores/basic", "latents/demo-64"]) == {
        "captions/source": '"caption_source_tokens" IS NOT NULL',
        "scores/basic": '"basic_sharpness" IS NOT NULL',
        "latents/demo-64": '"has_latents_demo_64"',
    }
