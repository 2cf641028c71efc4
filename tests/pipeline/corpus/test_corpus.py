import hashlib
import json
import multiprocessing
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus import attempt as attempts
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.records import Commit, Declaration, InputRef, ObjectRef, ShardRef, UnitCommit, canonical
from microdit.pipeline.corpus.shard_files import read_tar
from microdit.pipeline.storage.store import open_store
from tests.pipeline.helpers.racing_writers import build_all
from tests.pipeline.helpers.small_corpus import (
    FAILED,
    SHARD_SAMPLES,
    SOURCE,
    fill,
    keys_of,
    make_corpus,
    write_column,
    write_images,
)

SPAWN = multiprocessing.get_context("spawn")
RACERS, SHARDS = 3, 4
REF = ShardRef(source=SOURCE, unit=unit_name(SOURCE, 0), shard=shard_name(unit_name(SOURCE, 0), 0))
ROUND_TRIP = settings(max_examples=100, deadline=None, print_blob=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)

HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
COUNTS = st.integers(0, 10**6)
COLUMNS = st.sampled_from(["images", "captions/source", "scores/basic", "latents/sdxl-256", "text/t5-xxl@long"])
SOURCES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True)


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    column, source, attempt = draw(COLUMNS), draw(SOURCES), f"20261101T101500-{draw(HASHES)[:8]}"
    unit = unit_name(source, draw(st.integers(0, 10**7)))
    shard = shard_name(unit, draw(st.integers(0, 120)))
    base = f"{column}/{source}/{shard}.{attempt}"
    table = column.startswith(("captions", "scores"))
    names = [f"{base}.parquet"] * 2 if table else [f"{base}.tar", f"{base}.rows.parquet"]
    data, sidecar = (ObjectRef(name=name, size=draw(COUNTS), sha256=draw(HASHES)) for name in names)
    return Commit(
        column=column,
        source=source,
        unit=unit,
        shard=shard,
        generation=draw(COUNTS),
        attempt=attempt,
        object=data,
        sidecar=sidecar,
        counts={"in": draw(COUNTS), "out": draw(COUNTS), "failed": draw(COUNTS)},
        reasons=draw(st.dictionaries(TEXT, COUNTS, max_size=3)),
        fingerprint=draw(HASHES),
        inputs=draw(
            st.lists(st.builds(InputRef, column=COLUMNS, generation=st.integers(0, 9), sha256=HASHES), max_size=2)
        ),
        timings=draw(st.dictionaries(TEXT, st.floats(0, 1e9), max_size=3)),
        host=draw(TEXT),
    )


# -- records ---------------------------------------------------------------------------------------------------------
@ROUND_TRIP
@given(commits())
def test_a_commit_gives_back_itself(commit: Commit) -> None:
    data = commit.to_bytes()
    back = Commit.parse(data)
    assert back.to_bytes() == data
    assert back.sha256 == commit.sha256 == hashlib.sha256(data).hexdigest() == pickle.loads(pickle.dumps(back)).sha256
    assert json.loads(data) == commit.model_dump()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@ROUND_TRIP
@given(commits(), st.integers(1, 4))
def test_the_hash_of_a_commit_is_that_of_the_stored_bytes(commit: Commit, indent: int) -> None:
    stored = json.dumps(json.loads(commit.to_bytes()) | {"more": 1}, indent=indent).encode()
    assert Commit.parse(stored).as_input().sha256 == hashlib.sha256(stored).hexdigest()


@ROUND_TRIP
@given(stage=st.dictionaries(TEXT, JSON, max_size=4), scalars=st.dictionaries(TEXT, TEXT, max_size=3))
def test_a_declaration_gives_back_itself(stage: dict[str, Any], scalars: dict[str, str]) -> None:
    declaration = Declaration(name="latents/x", kind="tar", stage=stage, scalars=scalars)
    back = Declaration.parse(declaration.to_bytes())
    assert back == declaration and back.to_bytes() == declaration.to_bytes()
    assert back.fingerprint == hashlib.sha256(canonical(stage)).hexdigest()


@ROUND_TRIP
@given(inputs=COUNTS, shards=st.lists(TEXT, max_size=4), fingerprint=HASHES)
def test_a_unit_commit_gives_back_itself(inputs: int, shards: list[str], fingerprint: str) -> None:
    record = UnitCommit(source="a", unit="a-000000", inputs=inputs, shards=shards, fingerprint=fingerprint)
    assert UnitCommit.parse(record.to_bytes()) == record


@ROUND_TRIP
@given(commits(), st.data())
def test_a_damaged_commit_is_another_commit_or_one_error(commit: Commit, data: st.DataObject) -> None:
    damaged = bytearray(commit.to_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        back = Commit.parse(bytes(damaged))
    except ValueError:
        return
    assert back.sha256 != commit.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"column": "../x"},
        {"column": "latents/../../etc"},
        {"source": "a/../b"},
        {"shard": "x/../../y"},
        {"attempt": "../../x"},
        {"version": 2},
        {"object": {"name": "/etc/passwd", "size": 1, "sha256": "0"}},
        {"sidecar": {"name": "../other/sidecar.parquet", "size": 1, "sha256": "0"}},
    ],
)
def test_a_commit_names_nothing_but_its_own_attempt(tmp_path: Path, change: dict[str, Any]) -> None:
    corpus = make_corpus(tmp_path)
    record = json.loads(write_images(corpus, REF).to_bytes())
    with pytest.raises(ValueError):
        Commit.parse(canonical(record | change))


# -- root and declarations -------------------------------------------------------------------------------------------
def test_create_makes_or_opens(corpus_url: str) -> None:
    made = Corpus.create(corpus_url, "one", 64)
    assert (made.name, made.shard_samples, made.url) == ("one", 64, corpus_url)
    for again in (Corpus.create(corpus_url, "one", 64), Corpus.open(corpus_url), pickle.loads(pickle.dumps(made))):
        assert (again.name, again.shard_samples) == ("one", 64)
    with pytest.raises(RequestError, match=r"shard_samples is 64, the config says 128; set shard_samples to 64"):
        Corpus.create(corpus_url, "one", 128)
    with pytest.raises(RequestError, match=r"name is 'one', the config says 'two'"):
        Corpus.create(corpus_url, "two", 64)


def test_there_is_no_corpus(corpus_url: str) -> None:
    with pytest.raises(RequestError, match=r"there is no corpus\.json"):
        Corpus.open(corpus_url)


def test_a_corpus_out_of_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for action in (lambda: Corpus.open(tmp_path / "file"), lambda: Corpus.create(tmp_path / "file" / "corpus", "x")):
        with pytest.raises(RequestError, match=r"file.*cannot be (reached|written)"):
            action()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr("microdit.pipeline.storage.bucket.FIRST_PATIENCE", 0.5)
    with pytest.raises(RequestError, match=r"s3://bucket/x: it cannot be reached"):
        Corpus.open("s3://bucket/x")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b"{}", b'{"version": 1, "name": "x"}']
    + [b'{"version": 1, "name": "x", "shard_samples": %s}' % value for value in (b"null", b'"many"', b"0", b"1e999")],
)
def test_a_damaged_root_is_named(corpus_url: str, data: bytes) -> None:
    open_store(corpus_url).create("corpus.json", data)
    with pytest.raises(RequestError, match=r"corpus\.json is damaged"):
        Corpus.open(corpus_url)


def test_a_corpus_of_another_version_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).create("corpus.json", b'{"version": 2, "name": "x", "shard_samples": 1}')
    with pytest.raises(RequestError, match="format version is 2, this microdit reads 1"):
        Corpus.open(tmp_path)


def test_a_column_is_declared_once_for_ever(corpus_url: str) -> None:
    corpus = Corpus.create(corpus_url, "x")
    stage = {"model": {"name": "vae", "revision": "a"}, "resolution": 64}
    declared = corpus.declare_column("latents/vae-64", stage, {"norm": "float32"})
    assert corpus.declare_column("latents/vae-64", stage, {"norm": "float32"}) == declared
    assert Corpus.open(corpus_url).columns() == {"latents/vae-64": declared}
    with pytest.raises(RequestError, match=r"model\.revision: the corpus has 'a', the config says 'b'"):
        corpus.declare_column(
            "latents/vae-64", stage | {"model": {"name": "vae", "revision": "b"}}, {"norm": "float32"}
        )
    with pytest.raises(RequestError, match="its scalars differ"):
        corpus.declare_column("latents/vae-64", stage)
    with pytest.raises(RequestError, match=r"column 'text/x': .* it has: latents/vae-64"):
        corpus.column("text/x")
    source = corpus.declare_source("cc12m", {"adapter": "urls"})
    assert corpus.sources() == {"cc12m": source}
    with pytest.raises(RequestError, match="adapter: the corpus has 'urls', the config says 'tars'"):
        corpus.declare_source("cc12m", {"adapter": "tars"})


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "a b", "../x", "a/..", ".", "a/.b", "units", "commits/x", "tables", "a/"]
)
def test_bad_column_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="a name has one or two parts"):
        Corpus.create(tmp_path, "x").declare_column(name, {})


@pytest.mark.parametrize("name", ["", "CC12M", "-a", "a/b", "a.b", ".."])
def test_bad_source_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="a name is lower-case letters"):
        Corpus.create(tmp_path, "x").declare_source(name, {})


@pytest.mark.parametrize("scalars", [{"width": "int16"}, {"row": "int32"}])
def test_bad_scalars(tmp_path: Path, scalars: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="types are"):
        Corpus.create(tmp_path, "x").declare_column("images", {}, scalars)


# -- attempts and commits --------------------------------------------------------------------------------------------
def test_a_shard_is_written_and_read(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    images = write_images(corpus, REF)
    latents = write_column(corpus, "latents/demo-64", {"images": images})
    captions = write_column(corpus, "captions/source", {"images": images})
    assert images.counts == {"in": SHARD_SAMPLES, "out": SHARD_SAMPLES - 1, "failed": 1}
    assert images.reasons == {"http_404": 1} and latents.reasons == {"upstream": 1}
    assert latents.inputs == [images.as_input()]
    assert captions.object == captions.sidecar
    other = Corpus.open(corpus_url)
    assert other.commits("images") == [images] and other.commits("latents/demo-64") == [latents]
    assert other.committed("captions/source") == {(SOURCE, REF.shard): 0} == other.committed("captions/source", SOURCE)
    assert other.committed("captions") == other.committed("images", "elsewhere") == {}
    alive = [key for row, key in enumerate(keys_of(REF)) if row not in FAILED]
    with other.open_object(other.commit("images", SOURCE, REF.shard, 0)) as file:
        samples = list(read_tar(file))
    assert [key for key, _ in samples] == alive
    sidecar = other.sidecar(images).to_pylist()
    assert [line["key"] for line in sidecar] == keys_of(REF)
    for line, (_, members) in zip((line for line in sidecar if line["status"] == "ok"), samples, strict=True):
        assert other.store.get_range(images.object.name, line["offset"], line["size"]) == members["jpg"]
    assert [line["caption"] for line in other.sidecar(captions).to_pylist()][:3] == ["", "picture 1 — é", None]


def test_a_shard_in_which_all_rows_fail(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    images = write_images(corpus, REF, failed=range(SHARD_SAMPLES))
    assert images.counts == {"in": SHARD_SAMPLES, "out": 0, "failed": SHARD_SAMPLES}
    with corpus.open_object(images) as file:
        assert list(read_tar(file)) == []
    assert corpus.sidecar(images).column("status").to_pylist() == ["failed"] * SHARD_SAMPLES


def test_equal_samples_give_equal_bytes(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    first, second = write_images(corpus, REF), write_images(corpus, REF, generation=1)
    assert first.attempt != second.attempt
    assert (first.object.sha256, first.sidecar.sha256) == (second.object.sha256, second.sidecar.sha256)
    assert corpus.committed("images") == {(SOURCE, REF.shard): 1}
    assert corpus.commits("images") == [second]


def _objects(corpus: Corpus) -> set[str]:
    return {item.name for item in corpus.store.list() if item.name.endswith((".tar", ".parquet"))}


def _named(corpus: Corpus) -> set[str]:
    return {
        ref.name
        for name in corpus.columns()
        for commit in corpus.commits(name)
        for ref in (commit.object, commit.sidecar)
    }


def test_what_is_not_committed_is_dropped(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    with pytest.raises(RuntimeError), begin_attempt(corpus, "images", REF) as attempt:
        attempt.fail(0, "a", "http_404")
        raise RuntimeError
    with pytest.raises(ValueError, match="rows must be"), begin_attempt(corpus, "images", REF) as attempt:
        attempt.fail(1, "a", "http_404")
        attempt.commit()
    assert corpus.committed("images") == {} and _objects(corpus) == set() and not list(corpus.store.unfinished())


def test_the_loser_gets_the_winners_commit_and_drops_its_objects(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    with begin_attempt(corpus, "images", REF) as slow:
        slow.fail(0, "a", "timeout")
        fast = write_images(corpus, REF)
        lost = slow.commit()
        assert lost.to_bytes() == fast.to_bytes() and fast.ours and not lost.ours
    assert _objects(corpus) == _named(corpus) == {fast.object.name, fast.sidecar.name}


def test_of_many_attempts_one_is_the_shard(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    barrier, done = SPAWN.Barrier(RACERS), SPAWN.Queue()
    racers = [SPAWN.Process(target=build_all, args=(corpus_url, SHARDS, barrier, done)) for _ in range(RACERS)]
    for process in racers:
        process.start()
    told = {done.get(timeout=120) for _ in range(RACERS * SHARDS)}
    for process in racers:
        process.join(60)
    assert [process.exitcode for process in racers] == [0] * RACERS
    assert len(told) == SHARDS  # all racers were told the same winners
    stored = [
        [corpus.commit("images", SOURCE, shard_name(REF.unit, n), g).attempt for g in (0, 1)] for n in range(SHARDS)
    ]
    assert sorted(told) == [(number, *pair) for number, pair in enumerate(stored)]
    assert len(_objects(corpus)) == 2 * 2 * SHARDS  # nothing of the losers is left


@pytest.mark.parametrize("clock", ["monotonic", "time"])
def test_an_old_attempt_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: str) -> None:
    corpus = make_corpus(tmp_path)
    with begin_attempt(corpus, "images", REF) as attempt:
        attempt.fail(0, "a", "timeout")
        now = getattr(time, clock)()
        monkeypatch.setattr(attempts.time, clock, lambda: now + 12.1 * 3600)
        with pytest.raises(ValueError, match=r"12\.1 hours old, at most 12 are allowed"):
            attempt.commit()
    assert corpus.committed("images") == {}


def test_a_lost_answer_is_no_lost_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path)
    create = corpus.store.create

    def answer_lost_and_sent_again(name: str, data: bytes) -> None:
        create(name, data)
        create(name, data)

    monkeypatch.setattr(corpus.store, "create", answer_lost_and_sent_again)
    commit = write_images(corpus, REF)
    assert corpus.store.exists(commit.object.name) and corpus.store.exists(commit.sidecar.name)
    assert Corpus.open(tmp_path).commits("images") == [commit]


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "é", "a b", "x" * 81])
def test_bad_keys(tmp_path: Path, key: str) -> None:
    corpus = make_corpus(tmp_path)
    with begin_attempt(corpus, "images", REF) as attempt:
        with pytest.raises(ValueError, match="expected 1 to 80"):
            attempt.add(0, key, {"jpg": b"x"})
        with pytest.raises(ValueError, match="expected 1 to 80"):
            attempt.fail(0, key, "timeout")


def test_text_that_utf8_cannot_write_fails_the_sample_only(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    with begin_attempt(corpus, "captions/source", REF) as attempt:
        with pytest.raises(ValueError, match="sample a: caption has lone surrogates"):
            attempt.add(0, "a", caption="\ud800", tokens=1)
        attempt.fail(0, "a", "bad_text", "bad \ud800\n text", caption="x\udfff")
        attempt.add(1, "b", caption="", tokens=0)
        commit = attempt.commit()
    lines = corpus.sidecar(commit).to_pylist()
    assert [(line["detail"], line["caption"]) for line in lines] == [("bad ? text", "x?"), (None, "")]


def test_timings_and_reasons_are_kept(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    with begin_attempt(corpus, "captions/source", REF) as attempt:
        attempt.fail(0, "a", "timeout")
        attempt.fail(1, "b", "timeout")
        attempt.fail(2, "c", "bomb")
        commit = attempt.commit(seconds=1.5, requests=7)
    assert commit.timings.pop("cpu_seconds") >= 0 and commit.device == "cpu"
    assert commit.timings == {"seconds": 1.5, "requests": 7.0} and commit.reasons == {"timeout": 2, "bomb": 1}


def test_a_damaged_commit_is_named(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    corpus.store.create("commits/images/demo/demo-000000-00.0.json", b"{}")
    corpus.store.create("commits/images/demo/stray", b"{}")
    corpus.store.create("commits/units/demo/demo-000000.0.json", b"\x00")
    assert corpus.committed("images") == {(SOURCE, REF.shard): 0}
    for action in (lambda: corpus.commits("images"), lambda: corpus.commit("images", SOURCE, REF.shard, 0)):
        with pytest.raises(RequestError, match=r"commits/images/demo/demo-000000-00\.0\.json is damaged"):
            action()
    with pytest.raises(RequestError, match=r"commits/units/demo/demo-000000\.0\.json is damaged"):
        corpus.units(SOURCE)


# -- units -----------------------------------------------------------------------------------------------------------
def test_units(corpus_url: str) -> None:
    corpus = make_corpus(corpus_url)
    fill(corpus, units=2, shards=1, columns=())
    units = corpus.units(SOURCE)
    assert list(units) == [unit_name(SOURCE, 0), unit_name(SOURCE, 1)]
    assert units[REF.unit].shards == [REF.shard] and units[REF.unit].inputs == SHARD_SAMPLES
    assert units[REF.unit].fingerprint == corpus.source(SOURCE).fingerprint
    assert commit_unit(corpus, SOURCE, REF.unit, SHARD_SAMPLES, [REF.shard]) == units[REF.unit]
    with pytest.raises(ValueError, match="the source gave other inputs than before"):
        commit_unit(corpus, SOURCE, REF.unit, SHARD_SAMPLES + 1, [REF.shard])
