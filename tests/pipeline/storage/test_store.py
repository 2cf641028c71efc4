"""Stores on a disk and in a bucket: what both have in common, and the choice between them."""

import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.storage.disk import UNFINISHED
from microdit.pipeline.storage.store import open_store
from tests.pipeline.helpers.racing_writers import create_all, write_for_ever

RACERS, NAMES = 4, 25
SPAWN = multiprocessing.get_context("spawn")


def test_of_many_creators_exactly_one_wins(corpus_url: str) -> None:
    barrier, wins = SPAWN.Barrier(RACERS), SPAWN.Queue()
    racers = [
        SPAWN.Process(target=create_all, args=(corpus_url, racer, NAMES, barrier, wins)) for racer in range(RACERS)
    ]
    for process in racers:
        process.start()
    won = sorted(wins.get(timeout=120) for _ in range(NAMES))
    for process in racers:
        process.join(60)
    assert [process.exitcode for process in racers] == [0] * RACERS
    assert wins.empty()
    assert [number for number, _ in won] == list(range(NAMES))
    store = open_store(corpus_url)
    assert [store.get(f"raced/{number}") for number, _ in won] == [f"{racer}".encode() * 1000 for _, racer in won]
    assert not list(store.unfinished())


def test_a_name_is_written_once_whatever_its_size(corpus_url: str) -> None:
    store = open_store(corpus_url)
    big = os.urandom(11 << 20)  # above the size at which uploads go in parts, which know no conditions
    for name, data in (("empty", b""), ("folder/small", b"small"), ("folder/big", big)):
        store.create(name, data)
        with pytest.raises(FileExistsError):
            store.create(name, b"other")
        assert store.get(name) == data
    assert {item.name: item.size for item in store.list()} == {"empty": 0, "folder/small": 5, "folder/big": len(big)}
    assert [item.name for item in store.list("folder/big")] == []
    assert sorted(item.name for item in store.list("folder")) == ["folder/big", "folder/small"]


def test_reading(corpus_url: str) -> None:
    store = open_store(corpus_url)
    data = os.urandom(5 << 20)
    store.create("data", data)
    assert store.get_range("data", 1000, 77) == data[1000:1077]
    with store.open("data") as file:
        assert file.read() == data
        assert file.seek(4 << 20) == 4 << 20
        part = file.read(123)
        assert type(part) is bytes and part == data[4 << 20 :][:123]
        assert file.tell() == (4 << 20) + 123
    assert store.exists("data") and not store.exists("dat")
    with pytest.raises(FileNotFoundError):
        store.get("dat")


def test_delete_leaves_the_others_and_forgives_what_is_gone(corpus_url: str) -> None:
    store = open_store(corpus_url)
    for name in ("a", "b", "folder/c", "d"):
        store.create(name, b"x")
    store.delete(["a", "never", "folder/c"])
    assert sorted(item.name for item in store.list()) == ["b", "d"]
    store.delete(["a", "never"])
    store.delete([])


def test_a_scratch_file_is_no_object_until_it_is_published(corpus_url: str) -> None:
    store = open_store(corpus_url)
    with store.scratch("folder/object.tar") as path:
        path.write_bytes(b"whole")
        assert not list(store.list())
        store.publish({"folder/object.tar": path})
    assert [item.name for item in store.list()] == ["folder/object.tar"]
    with store.scratch("one/a.tar") as a, store.scratch("two/b.tar") as b:  # both at once, in folders of their own
        a.write_bytes(b"a")
        b.write_bytes(b"b")
        store.publish({"one/a.tar": a, "two/b.tar": b})
    assert (store.get("one/a.tar"), store.get("two/b.tar")) == (b"a", b"b")
    store.delete(["one/a.tar", "two/b.tar"])
    with pytest.raises(RuntimeError), store.scratch("folder/other.tar") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert not path.exists() and not list(store.unfinished())
    assert [item.name for item in store.list()] == ["folder/object.tar"]


def test_a_pickled_store_is_the_same_store(corpus_url: str) -> None:
    store = open_store(corpus_url)
    store.create("a", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.url == store.url and copy.get("a") == b"x"


def test_readers_beside_writers_see_whole_objects_only(corpus_url: str) -> None:
    store = open_store(corpus_url)
    store.create("first", b"x")
    writers = [SPAWN.Process(target=write_for_ever, args=(corpus_url,), daemon=True) for _ in range(2)]
    for process in writers:
        process.start()
    seen: set[str] = set()
    try:
        while len(seen) < 60:
            assert all(process.is_alive() for process in writers)
            for item in store.list("written"):
                assert item.size == 1_000_000 and not UNFINISHED.search(item.name)
                seen.add(item.name)
    finally:
        for process in writers:
            process.kill()
            process.join()
    for item in store.list("written"):
        assert store.get(item.name) == b"0123456789" * 100_000


@pytest.mark.parametrize("url", ["ftp://host/x", "http://host/x"])
def test_an_unknown_scheme_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match=r"scheme '(ftp|http)' is not known.*s3://"):
        open_store(url)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/a%20b")
    store.create("x", b"1")
    assert (tmp_path / "a b" / "x").read_bytes() == b"1"
