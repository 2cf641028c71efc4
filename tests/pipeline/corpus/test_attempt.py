"""Attempts: each generation of a shard is committed once, whoever races, dies or comes late."""

import multiprocessing
import time
from pathlib import Path

import pytest

from microdit.pipeline.corpus import attempt as attempts
from microdit.pipeline.corpus.attempt import begin_attempt, commit_unit
from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.corpus.names import shard_name, unit_name
from microdit.pipeline.corpus.shard_files import read_tar
from tests.pipeline.helpers.racing_writers import build_all
from tests.pipeline.helpers.small_corpus import (
    REF,
    SHARD_SAMPLES,
    SOURCE,
    fill,
    make_corpus,
    write_images,
)

SPAWN = multiprocessing.get_context("spawn")

RACERS, SHARDS = 3, 4


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
