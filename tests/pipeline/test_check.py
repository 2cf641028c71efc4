import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.check import gc, ls, status, verify
from pipeline.corpus import Commit, Corpus, ShardRef, canonical, shard_name, unit_name
from pipeline.errors import RequestError
from pipeline.failures import write_failure
from pipeline.joins import Joined, JoinSpec, build
from pipeline.samples import query, sample_table
from pipeline.selections import select
from pipeline.shards import TarWriter, array_bytes, read_table, write_table
from pipeline.sources.remote import list_files
from pipeline.store import Store
from pipeline.verify_shard import tar_members
from tests.pipeline.made import COLUMNS, SHARD_SAMPLES, SOURCE, fill, keys_of, make_corpus, write_column, write_images

UNIT = unit_name(SOURCE, 0)
REF = ShardRef(source=SOURCE, unit=UNIT, shard=shard_name(UNIT, 0))
NEXT = ShardRef(source=SOURCE, unit=UNIT, shard=shard_name(UNIT, 1))
LATENTS = "latents/demo-64"


def _problems(corpus: Corpus) -> list[tuple[str, str]]:
    found = verify(corpus)
    assert found["ok"] == (not found["problems"])
    json.dumps(found)
    return [(problem["kind"], problem["what"]) for problem in found["problems"]]


def _replace(corpus: Corpus, name: str, data: bytes | None) -> None:
    """Damage an object, which only a test does."""
    corpus.store.delete([name])
    if data is not None:
        corpus.store.create(name, data)


def _recommit(corpus: Corpus, commit: Commit, **change: Any) -> None:
    _replace(corpus, commit.name, canonical(json.loads(commit.to_bytes()) | change))


def _latents(corpus: Corpus) -> Commit:
    return corpus.commit(LATENTS, SOURCE, REF.shard, 0)


# -- verify ----------------------------------------------------------------------------------------------------------


def test_a_whole_corpus_has_no_problems(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, units=2)
    select(corpus, "all", "SELECT * FROM samples WHERE status = 'ok'")
    steps: list[tuple[int, int]] = []
    found = verify(corpus, lambda done, of: steps.append((done, of)))
    assert found["ok"] and found["problems"] == []
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    totals = found["totals"]
    assert (totals["shards"], totals["commits"], totals["units"], totals["open_units"]) == (4, 20, 2, 0)
    counts = {"in": 4 * SHARD_SAMPLES, "out": 4 * (SHARD_SAMPLES - 1), "failed": 4}
    assert totals["samples"] == dict.fromkeys(("images", *COLUMNS), counts)
    commits = [commit for column in corpus.columns() for commit in corpus.commits(column)]
    named = {ref.name for commit in commits for ref in (commit.object, commit.sidecar)}
    assert totals["bytes"] == sum(item.size for item in corpus.store.list() if item.name in named)


def test_an_unfinished_corpus_has_no_problems(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    assert _problems(corpus) == []
    images = write_images(corpus, REF, failed=range(SHARD_SAMPLES))
    write_column(corpus, "captions/source", {"images": images})
    write_images(corpus, NEXT)
    found = verify(corpus)
    assert found["ok"] and (found["totals"]["units"], found["totals"]["open_units"]) == (0, 1)


def test_a_flipped_bit_anywhere_is_found_and_named(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    commits = [corpus.commits(column)[0] for column in corpus.columns()]
    for name in sorted({ref.name for commit in commits for ref in (commit.object, commit.sidecar)}):
        whole = corpus.store.get(name)
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        _replace(corpus, name, bytes(flipped))
        assert _problems(corpus) == [("checksum", name)]
        _replace(corpus, name, whole)
    assert _problems(corpus) == []


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_in_a_record_is_found(tmp_path: Path, seed: int) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1)
    folders = {0: "commits/units", 1: "commits/images", 2: "columns", 3: "sources"}
    folder = folders.get(seed % 4, "")
    name = min(item.name for item in corpus.store.list(folder))
    data = bytearray(corpus.store.get(name))
    rng = random.Random(seed)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    _replace(corpus, name, bytes(data))
    assert _problems(Corpus.open(tmp_path)) != []


@pytest.mark.parametrize("change", [b"", b"x"])
def test_a_cut_or_longer_object_is_found(corpus_url: str, change: bytes) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1)
    commit = _latents(corpus)
    whole = corpus.store.get(commit.object.name)
    _replace(corpus, commit.object.name, whole + change if change else whole[:-1024])
    assert _problems(corpus) == [("size", commit.object.name)]


def test_a_deleted_object_is_found(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1)
    tar, table = _latents(corpus), corpus.commits("scores/basic")[0]
    corpus.store.delete([tar.object.name, tar.sidecar.name, table.object.name])
    assert sorted(_problems(corpus)) == sorted(
        ("missing", name) for name in (tar.object.name, tar.sidecar.name, table.object.name)
    )


def test_a_damaged_commit_is_found(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1)
    commit = corpus.commits("scores/basic")[0]
    _replace(corpus, commit.name, commit.to_bytes()[:-9])
    assert _problems(corpus) == [("commit", commit.name)]


def test_a_commit_under_another_name_is_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=2)
    commit = corpus.commits("scores/basic")[0]
    other = commit.name.replace(REF.shard, NEXT.shard)
    _replace(corpus, other, commit.to_bytes())
    assert _problems(corpus) == [("commit", other)]


def test_what_is_no_commit_is_found(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    strays = ["commits/notes.txt", "commits/latents/other/demo/x-00.0.json", "commits/images/elsewhere/x-00.0.json"]
    for name in strays:
        corpus.store.create(name, b"{}")
    assert sorted(_problems(corpus)) == sorted(("stray", name) for name in strays)


def test_a_damaged_declaration_is_found(corpus_url: str) -> None:
    fill(make_corpus(corpus_url), shards=1)
    corpus = Corpus.open(corpus_url)
    _replace(corpus, f"columns/{LATENTS}.json", b"{")
    _replace(corpus, "columns/scores/basic.json", corpus.store.get("columns/images.json"))
    _replace(corpus, f"sources/{SOURCE}.json", b"")
    assert sorted(_problems(corpus)) == [
        ("declaration", f"columns/{LATENTS}.json"),
        ("declaration", "columns/scores/basic.json"),
        ("declaration", f"sources/{SOURCE}.json"),
    ]


def test_another_fingerprint_is_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=["scores/basic"])
    unit = corpus.units(SOURCE)[UNIT]
    _recommit(corpus, corpus.commits("scores/basic")[0], fingerprint="other")
    name = f"commits/units/{SOURCE}/{UNIT}.0.json"
    _replace(corpus, name, unit.model_copy(update={"fingerprint": "other"}).to_bytes())
    assert sorted(_problems(corpus)) == [
        ("fingerprint", "commits/scores/basic/demo/demo-000000-00.0.json"),
        ("fingerprint", name),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {"in": 6, "out": 6, "failed": 0}},
        {"counts": {"in": 7, "out": 5, "failed": 1}},
        {"counts": {}},
        {"reasons": {}},
        {"reasons": {"timeout": 1}},
    ],
)
def test_wrong_counts_are_found(tmp_path: Path, change: dict[str, Any]) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1)
    commit = _latents(corpus)
    _recommit(corpus, commit, **change)
    assert _problems(corpus) == [("counts", commit.sidecar.name)]


def test_a_rebuilt_input_makes_a_column_stale(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=2, columns=["captions/source", "text/minilm@source"])
    newer = write_images(corpus, REF, quality=50, generation=1)
    stale = [f"commits/{column}/demo/{REF.shard}.0.json" for column in ("captions/source", "text/minilm@source")]
    assert _problems(corpus) == [("stale", name) for name in stale]
    found = status(corpus)["columns"]
    assert [found[column][SOURCE]["stale"] for column in ("images", "captions/source", "text/minilm@source")] == [
        0,
        1,
        1,
    ]
    captions = write_column(corpus, "captions/source", {"images": newer}, generation=1)
    assert _problems(corpus) == [("stale", stale[1])] * 2  # for the images, and for the captions
    write_column(corpus, "text/minilm@source", {"images": newer, "captions/source": captions}, generation=1)
    assert _problems(corpus) == []
    assert status(corpus)["columns"]["text/minilm@source"][SOURCE]["stale"] == 0


def test_inputs_that_are_not_those_that_are_there_are_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[LATENTS])
    commit = _latents(corpus)
    true = json.loads(commit.to_bytes())["inputs"][0]
    for inputs in (
        [],
        [true | {"sha256": "other"}],
        [true | {"generation": 3}],
        [true | {"column": "captions/source"}],
    ):
        _recommit(corpus, commit, inputs=inputs)
        assert _problems(corpus) == [("lineage", commit.name)]
    _recommit(corpus, commit)
    assert _problems(corpus) == []


def _with_sidecar(corpus: Corpus, commit: Commit, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another sidecar, with a commit whose checksum and counts fit it."""
    table = change(corpus.sidecar(commit))
    path = Path(str(corpus.store.root)) / commit.sidecar.name
    path.unlink()
    write_table(path, table)
    data = path.read_bytes()
    ref = {"name": commit.sidecar.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_of = {"sidecar": ref} | ({"object": ref} if commit.object == commit.sidecar else {})
    lines = table.to_pylist()
    failed = [line["reason"] for line in lines if line["status"] == "failed"]
    counts = {"in": len(lines), "out": len(lines) - len(failed), "failed": len(failed)}
    _recommit(corpus, commit, **change_of, counts=counts, reasons={r: failed.count(r) for r in failed if r})


def _set(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    where = table.column_names.index(name)
    return table.set_column(where, pa.field(name, table.schema.field(name).type), pa.array(values, table[name].type))


@pytest.mark.parametrize(
    ("column", "change", "kinds"),
    [
        (LATENTS, lambda table: table.slice(0, 5), {"keys", "rows", "tar"}),
        (LATENTS, lambda table: table.take([1, 0, 2, 3, 4, 5]), {"rows", "keys", "tar"}),
        (LATENTS, lambda table: _set(table, "key", 0, "other"), {"keys", "tar"}),
        (LATENTS, lambda table: _set(table, "offset", 0, 0), {"tar"}),
        (LATENTS, lambda table: _set(table, "size", 3, 17), {"tar"}),
        (LATENTS, lambda table: _set(table, "offset", 2, 512), {"rows"}),
        (LATENTS, lambda table: _set(table, "status", 1, "maybe"), {"rows", "counts", "tar"}),
        (LATENTS, lambda table: _set(table, "reason", 1, "upstream"), {"rows"}),
        (LATENTS, lambda table: _set(table, "reason", 2, "timeout"), {"rows"}),
        (LATENTS, lambda table: table.drop_columns(["detail"]), {"sidecar"}),
        (LATENTS, lambda table: table.append_column("more", pa.nulls(len(table))), {"sidecar"}),
        ("scores/basic", lambda table: _set(table, "status", 2, "ok"), {"rows"}),
        ("scores/basic", lambda table: _set(table, "key", 1, "demo-000000-00-0"), {"keys"}),
        ("images", lambda table: _set(table, "key", 0, "a.b"), {"keys", "tar", "lineage"}),
    ],
)
def test_a_sidecar_that_contradicts_is_found(
    tmp_path: Path, column: str, change: Callable[[pa.Table], pa.Table], kinds: set[str]
) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1)
    _with_sidecar(corpus, corpus.commits(column)[0], change)
    assert {kind for kind, _ in _problems(corpus)} == kinds


def _tar_bytes(tmp_path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    writer = TarWriter(tmp_path / "made.tar")
    for key, members in samples:
        writer.add(key, members)
    writer.close()
    return (tmp_path / "made.tar").read_bytes()


def _link_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.npy")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    return buffer.getvalue()


@settings(max_examples=60, deadline=None, print_blob=True)
@given(contents=st.lists(st.binary(max_size=1100), max_size=5), data=st.data())
def test_the_members_of_a_tar(
    contents: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    samples = [(f"key-{n}", {"npy": content, "json": b"{}"}) for n, content in enumerate(contents)]
    whole = _tar_bytes(tmp_path_factory.mktemp("tar"), samples)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert tar_members(io.BytesIO(whole)) == [(info.name, info.offset_data, info.size) for info in tar]
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    if damaged:
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        tar_members(io.BytesIO(bytes(damaged)))
    except ValueError:
        return


@pytest.mark.parametrize("damage", ["none", "order", "absent", "more", "double", "extension", "no tar", "link"])
def test_a_tar_that_is_not_what_the_sidecar_says_is_found(tmp_path: Path, damage: str) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    fill(corpus, shards=1)
    commit = _latents(corpus)
    alive = [line["key"] for line in corpus.sidecar(commit).to_pylist() if line["status"] == "ok"]
    rows = [int(key[-1]) for key in alive]
    samples = [(k, {"npy": array_bytes(np.full((4, 8, 8), r, np.float16))}) for k, r in zip(alive, rows, strict=True)]
    data = _tar_bytes(
        tmp_path,
        {
            "order": samples[::-1],
            "absent": samples[:-1],
            "more": [*samples, ("more", samples[0][1])],
            "double": [(key, {"npy": members["npy"], "txt": b""}) for key, members in samples],
            "extension": [(key, {"npz": members["npy"]}) for key, members in samples],
        }.get(damage, samples),
    )
    if damage == "double":  # members of a sample are not side by side
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for extension in ("npy", "txt"):
                for key, members in samples:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(members["npy"])
                    tar.addfile(info, io.BytesIO(members["npy"]))
        data = buffer.getvalue()
    data = {"no tar": b"x" * 2000, "link": _link_tar()}.get(damage, data)
    _replace(corpus, commit.object.name, data)
    ref = {"name": commit.object.name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _recommit(corpus, commit, object=ref)
    # another extension for all samples is another tar, and whole
    wanted = [] if damage in ("none", "extension") else [("tar", commit.object.name)]
    assert _problems(corpus) == wanted


def test_a_key_in_two_shards_is_found(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    write_images(corpus, REF)
    write_images(corpus, NEXT, keys=[*keys_of(REF)[:3], "x", "y", "z"])  # of these two are ok
    found = verify(corpus)["problems"]
    assert [(problem["kind"], problem["what"]) for problem in found] == [("keys", "images/demo")] * 2
    assert "demo-000000-00-0" in found[0]["detail"] and f"['{REF.shard}', '{NEXT.shard}']" in found[0]["detail"]


def test_a_failed_sample_may_come_again_in_a_retry_unit(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    retry = ShardRef(source=SOURCE, unit=f"{UNIT}-r1", shard=shard_name(f"{UNIT}-r1", 0))
    write_images(corpus, retry, failed=(), keys=[keys_of(REF)[2]])
    corpus.commit_unit(SOURCE, retry.unit, 1, [retry.shard])
    assert _problems(corpus) == []


def test_a_shard_that_is_too_long_is_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    commit = write_images(corpus, REF, rows=SHARD_SAMPLES + 1)
    assert _problems(corpus) == [("rows", commit.sidecar.name)]


def test_a_column_without_images_is_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=["scores/basic"])
    corpus.store.delete([f"commits/images/demo/{REF.shard}.0.json"])
    assert _problems(corpus) == [
        ("lineage", f"commits/scores/basic/demo/{REF.shard}.0.json"),
        ("unit", f"commits/units/demo/{UNIT}.0.json"),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": 2 * SHARD_SAMPLES + 1},
        {"shards": [REF.shard]},
        {"shards": [REF.shard, NEXT.shard, shard_name(UNIT, 2)]},
        {"unit": "demo-000001"},
        {"version": 2},
    ],
)
def test_a_wrong_unit_is_found(tmp_path: Path, change: dict[str, Any]) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=2, columns=[])
    name = f"commits/units/demo/{UNIT}.0.json"
    _replace(corpus, name, canonical(json.loads(corpus.store.get(name)) | change))
    assert _problems(corpus) == [("unit", name)]


def test_damaged_tables_and_selections_are_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    selection = select(corpus, "x", "SELECT * FROM samples WHERE status = 'ok'")
    table = sample_table(corpus).object.name
    for name in (selection.path, table):
        data = bytearray(corpus.store.get(name))
        data[len(data) // 2] ^= 1
        _replace(corpus, name, bytes(data))
    manifest = next(item.name for item in corpus.store.list("tables") if item.name.endswith(".json"))
    assert _problems(corpus) == [("table", manifest), ("selection", selection.path)]


def test_what_a_build_adds_meanwhile_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[LATENTS])
    listed = list(corpus.store.list("commits"))
    newer = write_images(corpus, REF, generation=1)  # after the listing: both columns and a whole new shard
    write_column(corpus, LATENTS, {"images": newer}, generation=1)
    other = ShardRef(source=SOURCE, unit=unit_name(SOURCE, 1), shard=shard_name(unit_name(SOURCE, 1), 0))
    images = write_images(corpus, other)
    late = write_column(corpus, LATENTS, {"images": images})
    there = Store.list

    def list_as_before(self: Store, prefix: str = "") -> Any:
        found = [item for item in there(self, prefix) if item.name == late.name or item in listed]
        return iter(found) if prefix == "commits" else there(self, prefix)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "list", list_as_before)
        found = verify(corpus)
    assert found["problems"] == []
    assert verify(corpus)["totals"]["open_units"] == 1


# -- status and ls ---------------------------------------------------------------------------------------------------


def test_status(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=2, columns=["captions/source"])
    write_column(corpus, LATENTS, {"images": corpus.commits("images")[0]})
    write_failure(corpus, LATENTS, SOURCE, NEXT.shard, stage="latents:demo", attempts=3, message="no", traceback="...")
    write_failure(corpus, LATENTS, SOURCE, REF.shard, stage="latents:demo", attempts=3, message="old", traceback="...")
    write_failure(corpus, "units", SOURCE, "demo-000007", stage="ingest", attempts=3, message="gone", traceback="...")
    found = json.loads(json.dumps(status(corpus)))
    assert found["sources"] == {SOURCE: {"units": None, "units_done": 1, "inputs": 2 * SHARD_SAMPLES}}
    assert found["columns"].keys() == {"images", *COLUMNS}
    images, latents = found["columns"]["images"][SOURCE], found["columns"][LATENTS][SOURCE]
    assert (images["done"], images["left"], images["in"], images["out"], images["failed"]) == (2, None, 12, 10, 2)
    assert images["reasons"] == {"http_404": 2}
    commits = corpus.commits("images")
    assert images["bytes"] == sum(commit.object.size + commit.sidecar.size for commit in commits)
    assert images["seconds"] == pytest.approx(sum(commit.timings["seconds"] for commit in commits))
    assert images["rate"] == pytest.approx(12 / images["seconds"], rel=1e-3)
    assert (latents["done"], latents["left"], latents["set_aside"], latents["stale"]) == (1, 1, 1, 0)
    nothing = found["columns"]["scores/basic"][SOURCE]
    assert (nothing["done"], nothing["left"], nothing["rate"], nothing["bytes"]) == (0, 2, None, 0)
    assert [(item["column"], item["shard"], item["message"]) for item in found["set_aside"]] == [
        (LATENTS, NEXT.shard, "no"),
        ("units", "demo-000007", "gone"),
    ]


def test_status_says_when_no_images_are_left(tmp_path: Path) -> None:
    corpus = Corpus.create(tmp_path, "x", SHARD_SAMPLES)
    corpus.declare_column("images", {}, {})
    corpus.declare_source("demo", {"units": 2})
    assert status(corpus)["columns"]["images"]["demo"]["left"] is None
    for number in range(2):
        corpus.commit_unit("demo", unit_name("demo", number), 0, [])
    assert status(corpus)["columns"]["images"]["demo"]["left"] == 0


def test_ls(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=2, columns=["captions/source"])
    write_images(corpus, REF, failed=range(SHARD_SAMPLES), generation=1)
    assert list(ls(corpus, "images")) == [f"{corpus_url}/{corpus.commits('images')[1].object.name}"]
    assert len(list(ls(corpus, "captions/source"))) == 2
    with pytest.raises(RequestError, match="has no such column"):
        list(ls(corpus, "captions"))


# -- gc --------------------------------------------------------------------------------------------------------------


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
    others = ["README", "tables/notes", f"{LATENTS}/demo/notes.tar", f"failures/{LATENTS}/demo/{REF.shard}.0.json"]
    for name in others:
        corpus.store.create(name, b"mine")
    orphans = _orphans(corpus)
    assert gc(corpus)["names"] == []  # they are young
    told = gc(corpus, older_than_hours=0, dry_run=True)
    assert _all(corpus) == keep | set(others) | set(orphans)
    done = gc(corpus, older_than_hours=0)
    assert {**done, "dry_run": True} == told
    assert done["names"] == sorted([*orphans, "tables/notes"]) and done["bytes"] == 3 * len("orphan") + len("mine")
    assert (done["attempts"], done["tables"], done["unfinished"], done["uploads"]) == (3, 1, 0, 0)
    assert _all(corpus) == keep | set(others) - {"tables/notes"}


def test_gc_lists_before_it_reads_the_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that is committed while gc runs stays: at the moment of the listing no commit named it."""
    corpus = make_corpus(tmp_path)
    create, waiting = corpus.store.create, []
    with corpus.attempt("scores/basic", REF) as attempt, monkeypatch.context() as patch:
        for row, key in enumerate(keys_of(REF)):
            attempt.add(row, key, sharpness=1.0)
        patch.setattr(corpus.store, "create", lambda *commit: waiting.append(commit))
        commit = attempt.commit()
    there = Store.list

    def commit_after_the_listing(self: Store, prefix: str = "") -> Any:
        found = list(there(self, prefix))
        if prefix == "":
            assert commit.object.name in [item.name for item in found]
            create(*waiting.pop())
        return iter(found)

    monkeypatch.setattr(Store, "list", commit_after_the_listing)
    assert gc(corpus, older_than_hours=0)["names"] == [] and not waiting
    assert corpus.store.exists(commit.object.name) and corpus.store.exists(commit.name)


def test_gc_keeps_the_attempts_of_a_commit_that_cannot_be_read(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=2, columns=[LATENTS])
    orphan = _orphans(corpus)[2]
    _replace(corpus, _latents(corpus).name, b"{")
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
    assert done["names"] == sorted([orphans[0], f"{orphans[0]}#123", "probes/1"])
    assert (done["attempts"], done["unfinished"], done["bytes"]) == (1, 2, len("orphan") + len("half"))
    assert corpus.store.exists(orphans[1]) and not unfinished.exists()


def test_gc_keeps_the_newest_sample_table(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, shards=1, columns=[])
    sample_table(corpus)
    write_column(corpus, "scores/basic", {"images": corpus.commits("images")[0]})
    if urlsplit(corpus_url).scheme == "s3":
        time.sleep(1.1)  # S3 keeps whole seconds
    newest = sample_table(corpus)
    assert gc(corpus, older_than_hours=0)["tables"] == 2
    left = {item.name for item in corpus.store.list("tables")}
    assert len(left) == 2 and newest.object.name in left
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
    assert gc(corpus, older_than_hours=0)["names"] == [stray]
    assert [Joined(corpus.store, table).get("k") for table in tables] == [{"a": "t"}, {"b": "t"}]
    assert _problems(corpus) == []
    made = next(item.name for item in corpus.store.list("tables/joins") if item.name.endswith(".parquet"))
    _replace(corpus, made, b"damaged")
    assert [kind for kind, _ in _problems(corpus)] == ["table"]
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
    names = [f"{prefix}/images/demo/a.tar", f"{prefix}-other/images/demo/a.tar"]
    for name in names:
        upload = client.create_multipart_upload(Bucket=bucket, Key=name)["UploadId"]
        client.upload_part(Bucket=bucket, Key=name, UploadId=upload, PartNumber=1, Body=b"part")
    began = [item["Initiated"] for item in client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"]]
    hours = (datetime.now(began[0].tzinfo) - min(began)) / timedelta(hours=1)
    assert gc(corpus, older_than_hours=hours + 1)["uploads"] == 0
    done = gc(corpus, older_than_hours=0)
    assert done["uploads"] == 1 and done["names"] == [names[0]]
    left = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"]
    assert [item["Key"] for item in left] == [names[1]]


WRITE = """
import sys
from pipeline.corpus import Corpus, ShardRef, shard_name, unit_name
from tests.pipeline.made import COLUMNS, SOURCE, write_column, write_images
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
    assert _problems(corpus) == []
    gc(corpus, older_than_hours=0)
    assert _problems(corpus) == []
    named = {ref.name for commit in commits for ref in (commit.object, commit.sidecar)}
    assert {item.name for item in corpus.store.list() if item.name.endswith((".tar", ".parquet"))} == named
    assert not list(corpus.store.unfinished())
    for commit in commits:  # a restart finds them and does not write them again
        assert read_table(corpus.store.get(commit.sidecar.name)).num_rows == SHARD_SAMPLES
