"""`verify` of a whole corpus: any damage is found and named, and nothing else is."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from microdit.pipeline.corpus.attempt import commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import ShardRef, canonical
from microdit.pipeline.selection.selections import select
from microdit.pipeline.storage.disk import Disk
from microdit.pipeline.tables.sample_table import sample_table
from microdit.pipeline.upkeep.verify import VerifiedSamples, verify
from tests.pipeline.helpers.small_corpus import (
    COLUMNS,
    LATENTS,
    NEXT,
    REF,
    SHARD_SAMPLES,
    SOURCE,
    UNIT,
    fill,
    keys_of,
    make_corpus,
    problems,
    replace,
    write_column,
    write_images,
)


def test_a_whole_corpus_has_no_problems(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, units=2)
    select(corpus, "all", "SELECT * FROM samples WHERE status = 'ok'")
    steps: list[tuple[int, int]] = []
    read: list[int] = []
    result = verify(corpus, lambda done, of, size: (steps.append((done, of)), read.append(size)))
    assert result.ok and result.problems == []
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    totals = result.totals
    assert (totals.shards, totals.commits, totals.units, totals.open_units) == (4, 20, 2, 0)
    counts = VerifiedSamples(4 * SHARD_SAMPLES, 4 * (SHARD_SAMPLES - 1), failed=4)
    assert totals.samples == dict.fromkeys(("images", *COLUMNS), counts)
    commits = [commit for column in corpus.columns() for commit in corpus.commits(column)]
    named = {ref.name for commit in commits for ref in (commit.object, commit.sidecar)}
    assert read == sorted(read) and read[-1] == totals.bytes
    assert totals.bytes == sum(item.size for item in corpus.store.list() if item.name in named)


def test_the_json_of_a_verification(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    corpus.store.create("commits/notes.txt", b"")
    result = json.loads(json.dumps(verify(corpus).to_dict()))
    detail = "it is no commit of a declared column and source"
    size = result["totals"].pop("bytes")
    assert size > 0 and result == {
        "corpus": str(tmp_path),
        "ok": False,
        "problems": [{"kind": "stray", "what": "commits/notes.txt", "detail": detail}],
        "totals": {
            "shards": 1,
            "commits": 1,
            "units": 1,
            "open_units": 0,
            "samples": {"images": {"in": SHARD_SAMPLES, "out": SHARD_SAMPLES - 1, "failed": 1}},
        },
    }


def test_an_unfinished_corpus_has_no_problems(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    assert problems(corpus) == []
    images = write_images(corpus, REF, failed=range(SHARD_SAMPLES))
    write_column(corpus, "captions/source", {"images": images})
    write_images(corpus, NEXT)
    result = verify(corpus)
    assert result.ok and (result.totals.units, result.totals.open_units) == (0, 1)


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
    replace(corpus, name, bytes(data))
    assert problems(Corpus.open(tmp_path)) != []


def test_what_is_no_commit_is_found(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    strays = ["commits/notes.txt", "commits/latents/other/demo/x-00.0.json", "commits/images/elsewhere/x-00.0.json"]
    for name in strays:
        corpus.store.create(name, b"{}")
    assert sorted(problems(corpus)) == sorted(("stray", name) for name in strays)


def test_a_damaged_declaration_is_found(corpus_url: str) -> None:
    fill(make_corpus(corpus_url), shards=1)
    corpus = Corpus.open(corpus_url)
    replace(corpus, f"columns/{LATENTS}.json", b"{")
    replace(corpus, "columns/scores/basic.json", corpus.store.get("columns/images.json"))
    replace(corpus, f"sources/{SOURCE}.json", b"")
    assert sorted(problems(corpus)) == [
        ("declaration", f"columns/{LATENTS}.json"),
        ("declaration", "columns/scores/basic.json"),
        ("declaration", f"sources/{SOURCE}.json"),
    ]


def test_a_key_in_two_shards_is_found(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    write_images(corpus, REF)
    write_images(corpus, NEXT, keys=[*keys_of(REF)[:3], "x", "y", "z"])  # of these two are ok
    double = verify(corpus).problems
    assert [(problem.kind, problem.what) for problem in double] == [("keys", "images/demo")] * 2
    assert "demo-000000-00-0" in double[0].detail and f"['{REF.shard}', '{NEXT.shard}']" in double[0].detail


def test_a_failed_sample_may_come_again_in_a_retry_unit(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    retry = ShardRef(source=SOURCE, unit=f"{UNIT}-r1", shard=shard_name(f"{UNIT}-r1", 0))
    write_images(corpus, retry, failed=(), keys=[keys_of(REF)[2]])
    commit_unit(corpus, SOURCE, retry.unit, 1, [retry.shard])
    assert problems(corpus) == []


def test_a_column_without_images_is_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=["scores/basic"])
    corpus.store.delete([f"commits/images/demo/{REF.shard}.0.json"])
    assert problems(corpus) == [
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
    replace(corpus, name, canonical(json.loads(corpus.store.get(name)) | change))
    assert problems(corpus) == [("unit", name)]


def test_damaged_tables_and_selections_are_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[])
    selection = select(corpus, "x", "SELECT * FROM samples WHERE status = 'ok'")
    table = sample_table(corpus).parts["images", ""][0].name
    whole = corpus.store.get(selection.path)
    replace(corpus, selection.path, whole[: len(whole) // 2])
    data = bytearray(corpus.store.get(table))
    data[len(data) // 2] ^= 1
    replace(corpus, table, bytes(data))
    assert problems(corpus) == [("table", table), ("selection", selection.path)]


def test_what_a_build_adds_meanwhile_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path)
    fill(corpus, shards=1, columns=[LATENTS])
    listed = list(corpus.store.list("commits"))
    newer = write_images(corpus, REF, generation=1)  # after the listing: both columns and a whole new shard
    write_column(corpus, LATENTS, {"images": newer}, generation=1)
    other = ShardRef(source=SOURCE, unit=unit_name(SOURCE, 1), shard=shard_name(unit_name(SOURCE, 1), 0))
    images = write_images(corpus, other)
    late = write_column(corpus, LATENTS, {"images": images})
    list_all = Disk.list

    def list_as_before(self: Disk, prefix: str = "") -> Any:
        then = [item for item in list_all(self, prefix) if item.name == late.name or item in listed]
        return iter(then) if prefix == "commits" else list_all(self, prefix)

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "list", list_as_before)
        result = verify(corpus)
    assert result.problems == []
    assert verify(corpus).totals.open_units == 1
