"""The commit table: what is read once, and what a cache that is stale, damaged or missing costs."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from obstore.exceptions import PermissionDeniedError

from microdit.pipeline.base.errors import DamagedError, RequestError
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from microdit.pipeline.selection.selections import select
from microdit.pipeline.selection.view import query
from microdit.pipeline.storage.bucket import Bucket
from microdit.pipeline.storage.disk import Disk
from microdit.pipeline.storage.store import Store
from microdit.pipeline.tables import commit_table as module
from microdit.pipeline.tables.commit_table import LINE, commit_table, totals
from microdit.pipeline.tables.sample_table import sample_table
from microdit.pipeline.upkeep.gc import gc
from microdit.pipeline.upkeep.status import status
from microdit.pipeline.upkeep.verify import verify
from tests.pipeline.helpers.old_sample_table import old_sample_table
from tests.pipeline.helpers.small_corpus import (
    COLUMNS,
    SHARD_SAMPLES,
    SOURCE,
    fill,
    make_corpus,
    write_column,
    write_images,
)

UNIT = unit_name(SOURCE, 0)
REF = ShardRef(source=SOURCE, unit=UNIT, shard=shard_name(UNIT, 0))
TABLES = "tables/commits"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five commits are enough for a table."""
    monkeypatch.setattr(module, "LEAST", 5)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the commits that are read one by one."""
    names: list[str] = []
    for kind in (Disk, Bucket):

        def watched(self: Store, name: str, get: Callable[[Any, str], bytes] = kind.get) -> bytes:
            if name.startswith("commits/"):
                names.append(name)
            return get(self, name)

        monkeypatch.setattr(kind, "get", watched)
    yield names


def same(first: pa.Table, second: pa.Table) -> bool:
    return first.sort_by("name").equals(second.sort_by("name"))


def test_it_says_what_the_commits_say(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus)
    newer = write_images(corpus, REF, failed=(0, 1), generation=1)
    table = commit_table(corpus)
    assert table.schema.equals(LINE)
    lines = {line["name"]: line for line in table.to_pylist()}
    assert sorted(lines) == sorted(item.name for item in corpus.store.list("commits"))
    assert lines[newer.name] == {
        "name": newer.name,
        "column": "images",
        "source": SOURCE,
        "shard": REF.shard,
        "generation": 1,
        "sha256": newer.sha256,
        "in": 6,
        "out": 4,
        "failed": 2,
        "bytes": newer.object.size + newer.sidecar.size,
        "seconds": newer.timings["seconds"],
        "reasons": [{"reason": "http_404", "count": 2}],
        "inputs": [],
        "unit": UNIT,
        "attempt": newer.attempt,
        "sidecar_sha256": newer.sidecar.sha256,
    }
    text = corpus.commit("text/minilm@source", SOURCE, REF.shard, 0)
    assert lines[text.name]["inputs"] == [item.model_dump() for item in text.inputs]
    assert lines[f"commits/units/{SOURCE}/{UNIT}.0.json"]["in"] == 2 * SHARD_SAMPLES


def test_only_what_is_new_is_read_again(corpus_url: str, reads: list[str]) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus)
    first = commit_table(corpus)
    assert len(reads) == len(first) == 11
    reads.clear()
    assert same(commit_table(Corpus.open(corpus_url)), first) and not reads
    newer = write_images(corpus, REF, generation=1)
    second = commit_table(corpus)
    assert reads == [newer.name] and len(second) == 12
    commit_table(corpus)
    assert reads == [newer.name] * 2  # one is not worth a table
    assert len([item for item in corpus.store.list(TABLES) if item.name.endswith(".json")]) == 1


def test_what_was_read_before_a_stop_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus)
    for name, value in {"AT_ONCE": 1, "BATCH": 2, "SAVE_EVERY": 4}.items():
        monkeypatch.setattr(module, name, value)
    get = Disk.get

    def stopped(self: Disk, name: str) -> bytes:
        if name.startswith("commits/") and len(reads) >= 8:
            raise KeyboardInterrupt
        return get(self, name)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(module, "threaded", lambda function, items: map(function, items))
        context.setattr(Disk, "get", stopped)
        commit_table(corpus)
    reads.clear()
    assert len(commit_table(corpus)) == 11 and len(reads) == 11 - 8


def test_what_is_not_listed_any_more_is_not_told(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus)
    whole = commit_table(corpus)
    gone = f"commits/scores/basic/{SOURCE}/{REF.shard}.0.json"
    corpus.store.delete([gone])
    assert set(whole["name"].to_pylist()) - set(commit_table(corpus)["name"].to_pylist()) == {gone}


def test_a_commit_that_was_removed_and_made_again_is_read_again(corpus_url: str) -> None:
    """It has the name of the old one and other content: what is cached by names is not of it."""
    corpus = make_corpus(corpus_url)
    fill(corpus)
    count = "SELECT count(*) FILTER (status = 'ok') AS n FROM samples"
    assert query(corpus, count)["n"].to_pylist() == [10]
    assert totals(commit_table(corpus))["images", SOURCE].out == 10
    if urlsplit(corpus_url).scheme == "s3":
        time.sleep(1.1)  # S3 keeps whole seconds
    corpus.store.delete([f"commits/images/{SOURCE}/{REF.shard}.0.json"])
    newest = {"images": write_images(corpus, REF, failed=(0, 1, 2))}
    for column in COLUMNS:
        newest[column] = write_column(corpus, column, newest, generation=1)
    assert query(corpus, count)["n"].to_pylist() == [8]
    counted = totals(commit_table(corpus))
    assert counted["images", SOURCE].out == 8 and not any(total.stale for total in counted.values())
    table = sample_table(corpus)
    assert sample_table(corpus) == table  # and its parts are there again


@pytest.mark.parametrize("error", [PermissionDeniedError("403"), PermissionError(13, "no"), OSError(30, "read-only")])
def test_a_corpus_that_can_only_be_read_can_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus)
    before = {item.name for item in corpus.store.list()}

    def refuse(*arguments: object) -> None:
        raise error

    for method in ("create", "scratch", "publish", "delete"):
        monkeypatch.setattr(Disk, method, refuse)
    assert query(corpus, "SELECT count(*) AS n FROM samples")["n"].to_pylist() == [12]
    assert status(corpus).columns["images"][SOURCE].out == 10
    with pytest.raises(RequestError, match="cannot be written"):
        select(corpus, "mine", "SELECT * FROM samples WHERE status = 'ok'")
    assert {item.name for item in corpus.store.list()} == before


@pytest.mark.parametrize("damage", ["manifest", "object", "no object", "other lines", "nothing"])
def test_the_cache_may_be_damaged_or_deleted(tmp_path: Path, damage: str, reads: list[str]) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus)
    whole = commit_table(corpus)
    (manifest,) = (tmp_path / TABLES).glob("*.json")
    (data,) = (tmp_path / TABLES).glob("*.parquet")
    if damage == "manifest":
        manifest.write_bytes(b"\xff{")
    elif damage == "object":
        data.write_bytes(data.read_bytes()[:-9] + b"something")
    elif damage == "no object":
        data.unlink()
    elif damage == "other lines":
        module.pq.write_table(whole.drop_columns(["inputs"]), data)
        about = json.loads(manifest.read_bytes())
        about["object"] |= {"sha256": module.hashlib.sha256(data.read_bytes()).hexdigest()}
        manifest.write_text(json.dumps(about))
    else:
        manifest.unlink()
    reads.clear()
    assert same(commit_table(corpus), whole) and len(reads) == len(whole)
    reads.clear()
    assert same(commit_table(corpus), whole) and not reads  # it was published again


def test_who_may_not_write_still_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus)
    whole = commit_table(corpus)
    gc(corpus, older_than_hours=0)
    for path in (tmp_path / TABLES).iterdir():
        path.unlink()
    for error in (PermissionError("no"), PermissionDeniedError("no")):

        def refuse(*given: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Disk, "publish", refuse)
        assert same(commit_table(corpus), whole)
        assert not list(corpus.store.list(TABLES))


def test_a_damaged_commit_is_named_until_there_is_a_newer_one(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus)
    name = f"commits/scores/basic/{SOURCE}/{REF.shard}.0.json"
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(DamagedError, match=name):
        commit_table(corpus)
    damage: list[str] = []
    assert len(commit_table(corpus, damage)) > 0
    assert len(damage) == 1 and name in damage[0]
    newer = write_column(corpus, "scores/basic", {"images": corpus.commits("images")[0]}, generation=1)
    names = commit_table(corpus)["name"].to_pylist()
    assert newer.name in names and name not in names


def test_totals_count_the_newest_commits(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus)
    before = totals(commit_table(corpus))
    assert before["units", SOURCE].done == 1 and before["units", SOURCE].inputs == 2 * SHARD_SAMPLES
    newer = write_images(corpus, REF, failed=(0, 1), generation=1)
    after = totals(commit_table(corpus))
    images = after["images", SOURCE]
    assert (images.done, images.inputs, images.out, images.failed) == (2, 12, 9, 3)
    assert images.reasons == {"http_404": 3}
    assert {where[0]: found.stale for where, found in after.items()} == {
        "images": 0,
        "units": 0,
        "captions/source": 1,
        "scores/basic": 1,
        "latents/demo-64": 1,
        "text/minilm@source": 1,
    }
    write_column(corpus, "scores/basic", {"images": newer}, generation=1)
    assert totals(commit_table(corpus))["scores/basic", SOURCE].stale == 0
    assert totals(LINE.empty_table()) == {}


def test_gc_and_verify_know_both_kinds_of_tables(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus)
    for number in range(2):
        status(corpus)
        query(corpus, "SELECT * FROM samples")
        fill(corpus, units=2 + number)
    status(corpus)
    groups = len(sample_table(corpus, reads=None).parts)
    manifests = sorted((tmp_path / "tables").rglob("*.json"), key=lambda path: path.stat().st_mtime)
    parts = set(corpus.store.names("tables/samples"))
    assert len(manifests) == 3 and len(parts) == 3 * groups  # the one run of units has grown
    assert verify(corpus).problems == []
    removed = gc(corpus, older_than_hours=0)
    assert removed.tables == 2 * 2 + 2 * groups
    assert sorted((tmp_path / "tables").rglob("*.json")) == manifests[-1:]
    assert set(corpus.store.names("tables/samples")) < parts and query(corpus, "SELECT 1").num_rows == 1
    os.truncate(next((tmp_path / TABLES).glob("*.parquet")), 100)
    assert [(problem.kind, problem.what.rpartition("/")[0]) for problem in verify(corpus).problems] == [
        ("table", TABLES)
    ]


def test_a_table_of_an_earlier_version_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    """It does not say where sidecars are: the commits of the columns that a query names are read for that."""
    corpus = make_corpus(tmp_path)
    fill(corpus)
    with monkeypatch.context() as patch:
        patch.setattr(module, "LINE", module.OLD_LINE)
        assert commit_table(corpus).schema.names == module.OLD_LINE.names
    reads.clear()
    table = commit_table(corpus)
    assert reads == [] and table.schema.equals(LINE) and table["attempt"].null_count == len(table)
    rows = query(corpus, "SELECT source, unit, shard, row, width, basic_sharpness FROM samples ORDER BY ALL")
    assert sorted({name.split("/")[1] for name in reads}) == ["images", "scores"] and len(reads) == 4
    expected = old_sample_table(corpus).select(rows.column_names)
    assert rows.to_pylist() == expected.to_pylist()
