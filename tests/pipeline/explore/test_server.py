"""The server of `microdit explore`: its answers equal what the corpus holds."""

import io
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.curation.duplicates import dedup
from microdit.pipeline.selection.selections import load_selection, select
from microdit.pipeline.selection.view import query
from tests.pipeline.explore.serving import Served, served
from tests.pipeline.helpers.report_corpus import (
    BROKEN_LATENT,
    FAILURES,
    HOSTILE,
    KEPT,
    ROWS,
    SHARDS,
    autoencoder_folder,
    corpus,
    run,
)

__all__ = ["autoencoder_folder", "corpus", "run"]

PAGES = [("", 7), ("status = 'ok'", 3), ("nsfw > 0.3 OR nsfw IS NULL", 100), ("one_per_group(duplicate_group)", 5)]


@pytest.fixture(scope="module")
def server(corpus: Corpus, run: Path) -> Iterator[Served]:
    """A server on the report's corpus after `dedup`, with a run beside it."""
    dedup(corpus, 6)
    with served(corpus, runs=run.parent) as found:
        yield found


def place(row: dict[str, object]) -> tuple[object, ...]:
    return row["source"], row["shard"], row["row"]


def test_the_corpus_is_described(server: Served, corpus: Corpus) -> None:
    about = server.get("corpus")
    assert (about["name"], about["rows"]) == (corpus.name, SHARDS * ROWS)
    assert about["sources"] == [{"name": "made", "rows": SHARDS * ROWS}]
    columns = {column["name"]: column for column in about["columns"]}
    known = query(corpus, "SELECT * FROM samples LIMIT 0").column_names
    assert set(columns) == {*known, "mark", "mark_note"}
    kinds = {
        "nsfw": "number",
        "license": "category",
        "caption_long": "text",
        "duplicate_keep": "flag",
        "mark": "category",
    }
    assert {name: columns[name]["kind"] for name in kinds} == kinds


@pytest.mark.parametrize(("where", "limit"), PAGES)
def test_pages_are_all_rows_once_and_in_order_and_back(server: Served, corpus: Corpus, where: str, limit: int) -> None:
    qualify = where.startswith("one_per_group")
    behind = f"WHERE true QUALIFY {where}" if qualify else f"WHERE {where}" if where else ""
    wanted = query(
        corpus, f"SELECT source, shard, row, key FROM samples {behind} ORDER BY source, shard, row"
    ).to_pylist()
    where = f"true QUALIFY {where}" if qualify else where
    pages = [server.get("rows", where=where, limit=limit)]
    while pages[-1]["next"]:
        pages.append(server.get("rows", where=where, limit=limit, after=pages[-1]["next"]))
    assert [(*place(row), row["key"]) for page in pages for row in page["rows"]] == [tuple(r.values()) for r in wanted]
    assert pages[0]["previous"] is None
    for page, before in zip(pages[:0:-1], pages[-2::-1], strict=True):
        assert server.get("rows", where=where, limit=limit, before=page["previous"])["rows"] == before["rows"]
    assert server.get("count", where=where) == {"rows": len(wanted), "of": SHARDS * ROWS}


def test_a_random_page_is_drawn_by_its_seed(server: Served) -> None:
    pages = [
        server.get("rows", where="status = 'ok'", order="random", seed=seed, limit=9)["rows"] for seed in (1, 1, 2)
    ]
    assert pages[0] == pages[1] != pages[2]
    assert len({place(row) for row in pages[0]}) == 9 and {row["status"] for row in pages[0]} == {"ok"}


@pytest.mark.parametrize("where", ["", "caption_long_tokens > 10"])
def test_histograms_count_what_the_filter_leaves(server: Served, corpus: Corpus, where: str) -> None:
    behind = f"WHERE {where}" if where else ""
    found = server.get("histogram", column="nsfw", where=where, bins=8)
    rows = query(corpus, f"SELECT nsfw FROM samples {behind}")["nsfw"].to_pylist()
    numbers = [value for value in rows if value is not None]
    edges = found["edges"]
    assert found["nulls"] == len(rows) - len(numbers) and len(edges) <= 9
    inside = [sum(low <= v < high for v in numbers) for low, high in pairwise(edges)]
    inside[-1] += sum(v >= edges[-1] for v in numbers)
    assert found["counts"] == inside
    assert edges == server.get("histogram", column="nsfw", bins=8)["edges"]
    found = server.get("histogram", column="license", where=where)
    wanted = query(corpus, f"SELECT license AS value, count(*) AS rows FROM samples {behind} GROUP BY 1").to_pylist()
    counted = {one["value"]: one["rows"] for one in found["values"]} | (
        {None: found["nulls"]} if found["nulls"] else {}
    )
    assert counted == {one["value"]: one["rows"] for one in wanted} and found["others"] == 0


def test_pictures_come_in_their_sizes_and_once_made_from_the_cache(server: Served, corpus: Corpus) -> None:
    for _ in range(2):
        for size, side in (("160", 104), ("full", 104)):
            answer = server.ask(f"/api/image?source=made&key=k4&size={size}")
            assert answer.headers["content-type"] == "image/jpeg"
            with Image.open(io.BytesIO(answer.data)) as image:
                assert image.format == "JPEG" and max(image.size) == side
    assert "failed" in server.refused("image", source="made", key="k1")
    assert "the corpus has none" in server.refused("image", source="made", key="k99")
    assert "expected 160" in server.refused("image", source="made", key="k4", size="7")


def test_one_sample_has_all_that_is_known_of_it(server: Served, corpus: Corpus) -> None:
    found = server.get("sample", source="made", key="k2")
    assert {one["column"]: one["text"] for one in found["captions"]} == {
        "captions/source": HOSTILE,
        "captions/long": HOSTILE + " in many more words",
    }
    scores = {one["name"]: one for one in found["scores"]}
    assert scores["nsfw"]["value"] == pytest.approx(0.05) and 0 <= scores["nsfw"]["percentile"] < 20
    assert found["provenance"]["origin"] == HOSTILE and "images" in found["provenance"]["commits"]
    (group,) = found["groups"]
    (members,) = query(corpus, f"SELECT count(*) AS n FROM samples WHERE {group['where']}")["n"].to_pylist()
    assert (group["kind"], group["rows"]) == ("duplicates", members) and members > 1
    found = server.get("sample", source="made", key=f"k{BROKEN_LATENT}")
    assert {"column": "latents/tiny-64", "reason": "not_finite", "detail": "7 values are no numbers"} in found[
        "failures"
    ]


def test_latents_are_decoded_and_others_say_why_not(server: Served) -> None:
    answer = server.ask("/api/decoded?source=made&key=k4&column=latents/tiny-64")
    with Image.open(io.BytesIO(answer.data)) as image:
        assert image.format == "PNG" and image.size == (64, 64)
    assert "not the one" in server.refused("decoded", source="made", key="k4", column="latents/other-64")
    assert "failed" in server.refused("decoded", source="made", key=f"k{BROKEN_LATENT}", column="latents/tiny-64")


def test_failures_by_reason_with_their_rows(server: Served) -> None:
    reasons = {(one["column"], one["reason"]): one["rows"] for one in server.get("failures")["reasons"]}
    assert reasons["images", "http_404"] == 2 and sum(n for (c, _), n in reasons.items() if c == "images") == len(
        FAILURES
    )
    assert reasons["latents/tiny-64", "not_finite"] == 1 and reasons["scores/nsfw", "damaged"] == 2
    first = server.get("failures", column="images", reason="http_404", limit=1)
    second = server.get("failures", column="images", reason="http_404", limit=1, after=first["next"])
    assert [row["key"] for row in first["rows"] + second["rows"]] == ["k1", "k17"] and second["next"] is None
    assert first["rows"][0]["detail"] == FAILURES[1][1] and not first["rows"][0]["picture"]
    (row,) = server.get("failures", column="latents/tiny-64", reason="not_finite")["rows"]
    assert (row["key"], row["detail"], row["picture"]) == (f"k{BROKEN_LATENT}", "7 values are no numbers", True)


def test_groups_have_all_their_members_and_the_kept_one(server: Served, corpus: Corpus) -> None:
    first = server.get("groups", kind="duplicates", limit=1)
    rest = server.get("groups", kind="duplicates", after=first["next"])
    found = {group["id"]: group for group in first["groups"] + rest["groups"]}
    sql = (
        "SELECT duplicate_group AS id, id AS one, duplicate_keep AS keep FROM samples WHERE duplicate_group IS NOT NULL"
    )
    wanted = query(corpus, sql).to_pylist()
    members = {(g["id"], f"{row['source']}/{row['key']}", row["kept"]) for g in found.values() for row in g["rows"]}
    assert members == {tuple(one.values()) for one in wanted}
    empty = server.get("groups", kind="semantic")
    assert empty["groups"] == [] and "microdit dedup --semantic" in empty["note"]


def test_two_filters_beside_each_other(server: Served, corpus: Corpus) -> None:
    found = server.get("compare", a="nsfw < 0.5", b="status = 'ok' QUALIFY one_per_group(duplicate_group)", seed=3)
    (n,) = query(corpus, "SELECT count(*) AS n FROM samples WHERE nsfw < 0.5")["n"].to_pylist()
    kept = "SELECT * FROM samples WHERE status = 'ok' QUALIFY one_per_group(duplicate_group)"
    (both,) = query(corpus, f"SELECT count(*) AS n FROM ({kept}) WHERE nsfw < 0.5")["n"].to_pylist()
    assert (found["a"]["rows"], found["both"]) == (n, both) and len(found["a"]["sample"]) == n
    assert (
        server.get("compare", a="nsfw < 0.5", b="nsfw > 0.2")["both"]
        == server.get("count", where="nsfw < 0.5 AND nsfw > 0.2")["rows"]
    )


def test_a_selection_is_the_command_lines_own(server: Served, corpus: Corpus) -> None:
    where = "status = 'ok' AND nsfw < 0.4"
    saved = server.post("selections", name="calm", where=where).json
    again = select(corpus, "calm", f"SELECT source, shard, row FROM samples WHERE {where}")
    assert (saved["name"], saved["rows"]) == (f"calm@{again.hash}", again.rows)
    assert len(load_selection(corpus, saved["name"])) == server.get("count", where=where)["rows"]
    (shown,) = [
        one for one in server.get("sample", source="made", key="k4")["selections"] if one["name"] == saved["name"]
    ]
    assert shown["chosen"] and where in shown["why"]
    assert "no rows" in server.post("selections", name="none", where="false").json["error"]
    assert "a name is letters" in server.post("selections", name="../x", where=where).json["error"]


def test_marks_are_seen_by_sql_and_undone_by_the_next(server: Served, corpus: Corpus) -> None:
    assert server.get("count", where="mark = 'drop'")["rows"] == 0
    made = server.post("marks", source="made", key="k4", mark="drop", note="too <b>dark").json
    assert (made["mark"], made["note"]) == ("drop", "too <b>dark") and made["who"]
    assert server.get("count", where="mark = 'drop' AND mark_note ILIKE '%dark%'")["rows"] == 1
    assert [row["mark"] for row in server.get("rows", where="key = 'k4'")["rows"]] == ["drop"]
    assert server.get("sample", source="made", key="k4")["mark"]["note"] == "too <b>dark"
    assert query(corpus, "SELECT key FROM samples WHERE mark = 'drop'")["key"].to_pylist() == ["k4"]
    first = select(corpus, "left", "SELECT source, shard, row FROM samples WHERE status = 'ok' AND mark IS NULL")
    assert first.rows == KEPT - 1
    server.post("marks", source="made", key="k4", mark=None, note="")
    assert server.get("count", where="mark IS NOT NULL")["rows"] == 0
    second = select(corpus, "left", "SELECT source, shard, row FROM samples WHERE status = 'ok' AND mark IS NULL")
    assert second.rows == KEPT and second.hash != first.hash
    assert [mark["mark"] for mark in server.get("marks")["marks"]] == [None, "drop"]
    assert server.get("corpus")["marks"] == {"keep": 0, "drop": 0}
    assert "the corpus has none" in server.post("marks", source="made", key="k99", mark="keep").json["error"]
    assert "expected keep" in server.post("marks", source="made", key="k4", mark="burn").json["error"]


def test_runs_have_curves_sheets_and_broken_samples(server: Served, run: Path) -> None:
    (about,) = [one for one in server.get("runs") if one["name"] == run.name]
    found = server.get(f"runs/{run.name}")
    curves = {curve["name"]: curve["points"] for curve in found["curves"]}
    assert next(iter(curves)) == "loss" and len(curves["loss"]) > 100 and about["steps"] >= 120
    for sheet in found["sheets"][:1]:
        data = server.ask(f"/api/runs/{run.name}/sheet?step={sheet['step']}").data
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "PNG"
    assert "there is none" in server.refused("runs/nope")
    assert "there is none" in server.refused("runs/..%2f..%2fetc")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nsfw <", "syntax error"),
        ("nsfww < 1", '"nsfww" not found'),
        ("true LIMIT 3", "not a whole query"),
        ("true GROUP BY source", "not a whole query"),
        ("true UNION SELECT 1, 2, 3", "not a whole query"),
        ("true) OR (true", "syntax error"),
        ("true; DROP VIEW samples", "2 statements|DROP|expected one SELECT"),
        ("key IN (SELECT content FROM read_text('/etc/passwd'))", "disabled by configuration"),
        ("1 = (SELECT count(*) FROM 'https://example.org/x.parquet')", "disabled|does not exist"),
        ("x" * 30_000, "30,000 characters"),
    ],
)
def test_wrong_conditions_have_one_message(server: Served, where: str, message: str) -> None:
    for name in ("rows", "count"):
        error = server.refused(name, where=where)
        assert any(part in error for part in message.split("|")), error


def test_sql_that_never_ends_is_stopped_when_its_reader_leaves(server: Served) -> None:
    endless = "(SELECT count(*) FROM range(1000000000) a, range(1000000) b) > 0"
    for _ in range(4):  # more than there are workers
        with pytest.raises(TimeoutError):
            leaving = Served(server.url)
            leaving.leave("count", endless)
    began = time.monotonic()
    assert server.get("count", where="nsfw < 0.3")["rows"] > 0
    assert time.monotonic() - began < 10


def test_a_corpus_without_images_is_refused(tmp_path: Path) -> None:
    empty = Corpus.create(tmp_path / "corpus", "empty")
    with pytest.raises(RequestError, match="it has no images yet"), served(empty):
        pass
