"""A prefix of a bucket has one writer: others wait for a sign of life, and take over from who was killed."""

import json
import threading
import time

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.base.machine import has_died, machine, this_process
from microdit.pipeline.storage import bucket_lock
from microdit.pipeline.storage.bucket_lock import BucketLock
from microdit.pipeline.storage.store import Store, open_store

ELSEWHERE = json.dumps({"machine": "another", "host": "far", "pid": 7, "since": "2026-11-30 12:00 UTC"}).encode()


@pytest.fixture
def store(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(bucket_lock, "BEAT", 0.3)
    monkeypatch.setattr(bucket_lock, "EXPIRES", 3.0)
    monkeypatch.setattr(bucket_lock, "LOOK_EVERY", 0.1)
    return open_store(s3_url)


def test_a_second_one_is_refused_while_the_first_lives(store: Store) -> None:
    said: list[str] = []
    with BucketLock(store, "run", pytest.fail):
        with pytest.raises(RequestError, match=r"another run works in s3://.* \(process \d+ on .* since .*\): wait"):
            BucketLock(store, "run", said.append).__enter__()
        assert list(store.names()) == ["lock/00000001"]
        assert len(said) == 1 and "looking if it lives" in said[0]
    assert not list(store.names())
    with BucketLock(store, "run", pytest.fail) as none:
        assert none is None
    assert not list(store.names())


def test_of_many_at_once_at_most_one_has_it(store: Store) -> None:
    for dead in (False, True):
        if dead:
            store.create("lock/00000004", ELSEWHERE)
        held: list[BucketLock] = []

        def attempt(held: list[BucketLock] = held) -> None:
            lock = BucketLock(store, "run", lambda text: None)
            try:
                lock.__enter__()
            except RequestError:
                return
            lock.check()
            held.append(lock)

        threads = [threading.Thread(target=attempt) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) == 1
        held[0].check()
        held[0].__exit__()
        assert not list(store.names())


def test_who_was_killed_on_another_machine_is_watched_first(store: Store) -> None:
    store.create("lock/00000001", ELSEWHERE)
    began = time.monotonic()
    with BucketLock(store, "run", lambda text: None):
        assert time.monotonic() - began >= 3.0
        assert sorted(store.names()) == ["lock/00000001", "lock/00000002"]
    assert not list(store.names())


def test_who_was_killed_on_this_machine_is_known(store: Store) -> None:
    gone = this_process() | {"pid": 2**22 + 1, "since": "now"}
    store.create("lock/00000001", json.dumps(gone).encode())
    began = time.monotonic()
    with BucketLock(store, "run", pytest.fail):
        assert time.monotonic() - began < 3.0


def test_who_was_held_up_does_not_write(store: Store) -> None:
    first = BucketLock(store, "run", pytest.fail)
    first.__enter__()
    store.create("lock/00000002", ELSEWHERE)  # of one that saw no sign of life
    with pytest.raises(OSError, match=r"another run works .*process 7 on far.*held up"):
        first.check()
    first.__exit__()
    assert list(store.names()) == ["lock/00000002"]


def test_processes_of_this_machine() -> None:
    assert machine() is not None and not has_died(this_process())
    assert has_died(this_process() | {"pid": 2**22 + 1})
    assert not has_died(this_process() | {"pid": 2**22 + 1, "machine": "another"})
    with pytest.raises(KeyError):
        has_died({})
