"""`gc` of what killed writers left; what is committed stays."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest

from microdit.pipeline.corpus.attempt import begin_attempt
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.shard_files import read_table
from microdit.pipeline.files.find import list_files
from microdit.pipeline.selection.view import query
from microdit.pipeline.storage.disk import Disk
from microdit.pipeline.tables.joins.build import build
from microdit.pipeline.tables.joins.lookup import Joined
from microdit.pipeline.tables.joins.spec import JoinSpec
from microdit.pipeline.tables.sample_table import sample_table
from microdit.pipeline.upkeep.gc import gc
from tests.pipeline.helpers.small_corpus import (
    LATENTS,
    REF,
    SHARD_SAMPLES,
    fill,
    keys_of,
    latents,
    make_corpus,
    problems,
    replace,
    write_column,
    write_images,
)


def _all(corpus: Corpus) -> set[str]:
    return {item.name for item in corpus.store.list()} | {path.name for path in corpus.store.unfinished()}


def _orphans(corpus: Corpus) -> list[str]:
    """What a writer that was killed between publishing and committing leaves."""
    base = f"{LATENTS}/demo/{REF.shard}.20200101T000000-0123abcd"
    names = [f"{base}.tar", f"{base}.rows.parquet", f"scores/basic/demo/{REF.shard}.20200101T000000-0123abcd.parquet"]
    for name in names:
        corpus.store.create(name, b"orphan")
    return names


def test_gc_removes_what_no_commit_names(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1)
    write_images(corpus, REF, generation=1)
    keep = _all(corpus)
    others = [
        *("README", "tables/notes", "tables/notes.json", f"{LATENTS}/demo/notes.tar"),
        *(f"failures/{LATENTS}/demo/{REF.shard}.0.json", f"undeclared/demo/{REF.shard}.20200101T000000-0123abcd.tar"),
    ]
    for name in others:
        corpus.store.create(name, b"mine")
    table = f"tables/{'0' * 64}.20200101T000000-0123abcd.parquet"
    corpus.store.create(table, b"mine")
    orphans = _orphans(corpus)
    assert gc(corpus).names == []  # they are young
    planned = gc(corpus, older_than_hours=0, dry_run=True)
    assert _all(corpus) == keep | {*others, *orphans, table}
    done = gc(corpus, older_than_hours=0)
    assert dataclasses.replace(done, dry_run=True) == planned
    assert done.names == sorted([*orphans, table]) and done.bytes == 3 * len("orphan") + len("mine")
    assert (done.attempts, done.tables, done.unfinished, done.uploads) == (3, 1, 0, 0)
    assert _all(corpus) == keep | set(others)


def test_gc_lists_before_it_reads_the_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that is committed while gc runs stays: at the moment of the listing no commit named it."""
    corpus = make_corpus(tmp_path)
    create, waiting = corpus.store.create, []
    with begin_attempt(corpus, "scores/basic", REF) as attempt, monkeypatch.context() as patch:
        for row, key in enumerate(keys_of(REF)):
            attempt.add(row, key, sharpness=1.0)
        patch.setattr(corpus.store, "create", lambda *commit: waiting.append(commit))
        commit = attempt.commit()
    list_all = Disk.list

    def commit_after_the_listing(self: Disk, prefix: str = "") -> Any:
        listed = list(list_all(self, prefix))
        if prefix == "":
            assert commit.object.name in [item.name for item in listed]
            create(*waiting.pop())
        return iter(listed)

    monkeypatch.setattr(Disk, "list", commit_after_the_listing)
    assert gc(corpus, older_than_hours=0).names == [] and not waiting
    assert corpus.store.exists(commit.object.name) and corpus.store.exists(commit.name)


def test_gc_keeps_the_attempts_of_a_commit_that_cannot_be_read(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=2, columns=[LATENTS])
    orphan = _orphans(corpus)[2]
    replace(corpus, latents(corpus).name, b"{")
    before = _all(corpus)
    gc(corpus, older_than_hours=0)
    assert _all(corpus) == before - {orphan}


def test_gc_goes_by_age(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    orphans = _orphans(corpus)
    unfinished = tmp_path / f"{orphans[0]}#123"
    unfinished.write_bytes(b"half")
    for number in "12":
        corpus.store.create(f"probes/{number}", b"")
    for name in (orphans[0], f"{orphans[0]}#123", "probes/1"):
        old = time.time() - 49 * 3600
        os.utime(tmp_path / name, (old, old))
    done = gc(corpus)
    assert done.names == sorted([orphans[0], f"{orphans[0]}#123", "probes/1"])
    assert (done.attempts, done.unfinished, done.bytes) == (1, 2, len("orphan") + len("half"))
    assert corpus.store.exists(orphans[1]) and not unfinished.exists()


def test_gc_keeps_the_parts_of_the_newest_commits(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1, columns=["scores/basic"])
    first = sample_table(corpus)
    newer = write_images(corpus, REF, generation=1)
    write_column(corpus, "scores/basic", {"images": newer}, generation=1)
    newest = sample_table(corpus)
    old = f"tables/{'a' * 64}"  # as older versions made it, in one piece
    for name in (f"{old}.json", f"{old}.20200101T000000-0123abcd.parquet", "tables/samples/notes"):
        corpus.store.create(name, b"old")
    done = gc(corpus, older_than_hours=0)
    gone = [ref.name for refs in first.parts.values() for ref in refs]
    assert done.names == sorted([*gone, f"{old}.json", f"{old}.20200101T000000-0123abcd.parquet"])
    kept = {ref.name for refs in newest.parts.values() for ref in refs}
    assert set(corpus.store.names("tables")) == {*kept, "tables/samples/notes"} and sample_table(corpus) == newest
    assert query(corpus, "SELECT count(*) AS n FROM samples")["n"].to_pylist() == [SHARD_SAMPLES]


def test_join_tables_are_kept_and_verified(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus, shards=1, columns=[])
    tables = []
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"key": "k", "text": "t"}\n')
        tables.append(JoinSpec(list_files(str(tmp_path / f"{name}.jsonl"), "table"), "jsonl", "key", {name: "text"}))
        build(corpus, tables[-1], tmp_path / "scratch", print)
    stray = f"{tables[0].base}.20200101T000000-00000000.parquet"  # of a build that was killed
    corpus.store.create(stray, b"")
    assert gc(corpus, older_than_hours=0).names == [stray]
    assert [Joined(corpus.store, table).get("k") for table in tables] == [{"a": "t"}, {"b": "t"}]
    assert problems(corpus) == []
    made = next(item.name for item in corpus.store.list("tables/joins") if item.name.endswith(".parquet"))
    replace(corpus, made, b"damaged")
    assert [kind for kind, _ in problems(corpus)] == ["table"]
    for left in (".json", ".parquet"):  # deleted by half: it is made again
        corpus.store.delete([item.name for item in corpus.store.list("tables/joins") if item.name.endswith(left)])
        for table in tables:
            build(corpus, table, tmp_path / "scratch", print)
        assert [Joined(corpus.store, table).get("k") for table in tables] == [{"a": "t"}, {"b": "t"}]


def test_gc_aborts_old_uploads(s3_url: str) -> None:
    corpus = make_corpus(s3_url)
    where = urlsplit(s3_url)
    bucket, prefix = where.netloc, where.path.strip("/")
    client = boto3.client("s3")
    tar = f"images/demo/{REF.shard}.20200101T000000-0123abcd.tar"
    names = [f"{prefix}/{tar}", f"{prefix}-other/{tar}", f"{prefix}/notes.tar", f"{prefix}/second/{tar}"]
    for name in names:
        upload = client.create_multipart_upload(Bucket=bucket, Key=name)["UploadId"]
        client.upload_part(Bucket=bucket, Key=name, UploadId=upload, PartNumber=1, Body=b"part")
    began = [item["Initiated"] for item in client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"]]
    hours = (datetime.now(began[0].tzinfo) - min(began)) / timedelta(hours=1)
    assert gc(corpus, older_than_hours=hours + 1).uploads == 0
    done = gc(corpus, older_than_hours=0)
    assert done.uploads == 1 and done.names == [names[0]]
    left = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"]
    assert sorted(item["Key"] for item in left) == sorted(names[1:])


WRITE = """
import sys
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef
from tests.pipeline.helpers.small_corpus import COLUMNS, SOURCE, write_column, write_images
corpus, unit, done = Corpus.open(sys.argv[1]), unit_name(SOURCE, 0), Corpus.open(sys.argv[1]).committed("images")
print("ready", flush=True)
for number in range(100000):
    ref = ShardRef(source=SOURCE, unit=unit, shard=shard_name(unit, number))
    if (SOURCE, ref.shard) in done:
        continue
    newest = {"images": write_images(corpus, ref)}
    for column in COLUMNS:
        newest[column] = write_column(corpus, column, newest)
"""


def test_a_killed_writer_leaves_nothing_that_counts(corpus_url: str) -> None:
    """SIGKILL at random moments; what is committed is whole, what is not is swept."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    corpus = make_corpus(corpus_url)
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITE, corpus_url], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.0, 0.3))
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
    commits = [commit for column in corpus.columns() for commit in corpus.commits(column)]
    assert problems(corpus) == []
    gc(corpus, older_than_hours=0)
    assert problems(corpus) == []
    named = {ref.name for commit in commits for ref in (commit.object, commit.sidecar)}
    assert {item.name for item in corpus.store.list() if item.name.endswith((".tar", ".parquet"))} == named
    assert not list(corpus.store.unfinished())
    for commit in commits:  # a restart finds them and does not write them again
        assert read_table(corpus.store.get(commit.sidecar.name)).num_rows == SHARD_SAMPLES
