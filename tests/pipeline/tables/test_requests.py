"""Requests that queries take of a bucket, counted at a server."""

from pathlib import Path

import pytest

from benchmarks.full_size_server import LateS3
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.selection.view import query
from microdit.pipeline.tables import commit_table
from tests.pipeline.helpers.small_corpus import COLUMNS, fill, make_corpus

NUMBERS = "SELECT count(*) AS n, avg(width) AS width FROM samples WHERE status = 'ok'"


def reads(url: str, proxy: LateS3, sql: str) -> int:
    """Run a query; count the objects that are read for it, whole or in part."""
    proxy.clear()
    assert query(Corpus.open(url), sql).num_rows
    return proxy.requests["GET"]


def test_what_a_query_reads_of_a_bucket(s3_server: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_table, "LEAST", 5)
    with LateS3(s3_server, 0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        found = {}
        for units in (1, 3):
            url = f"{s3_url}/{units}"
            fill(make_corpus(url), units=units)
            asked = {"first": NUMBERS, "again": NUMBERS, "captions": "SELECT caption_source FROM samples"}
            found[units] = {name: reads(url, proxy, sql) for name, sql in asked.items()}
            found[units]["all"] = reads(url, proxy, "SELECT * FROM samples")
    shards, commits = 2, 2 * (len(COLUMNS) + 1) + 1  # of each unit
    grown = {name: found[3][name] - found[1][name] for name in found[1]}
    assert grown["first"] == 2 * (commits + shards), "each commit once, and of the sidecars those of the images"
    assert grown["again"] == 0 and found[3]["again"] < found[3]["first"] // 2
    assert grown["captions"] == 2 * shards
    assert grown["all"] == 2 * shards * (len(COLUMNS) + 1), (
        "of each sidecar, which all have more fields, once; no commit again"
    )


def test_copies_of_parts_are_kept_where_the_environment_says(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    fill(make_corpus(s3_url), units=1)
    query(Corpus.open(s3_url), NUMBERS)
    assert any((tmp_path / "kept/microdit").iterdir())
