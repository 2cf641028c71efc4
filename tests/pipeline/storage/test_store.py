import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.storage.bucket import sweep_scratch
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


DIE = """
import os, signal, sys
from microdit.pipeline.storage.store import Store, open_store
store = open_store(sys.argv[1])
with store.scratch("folder/object") as path:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_no_object(tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", DIE, str(tmp_path / "corpus")], check=False)
    assert died.returncode == -signal.SIGKILL
    store = open_store(tmp_path / "corpus")
    assert not list(store.list())
    assert [path.name.split("#")[0] for path in store.unfinished()] == ["object"]
    store.create("folder/object", b"whole")


def test_what_killed_writers_to_a_bucket_left_on_this_machine_is_swept(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, young, other = (tmp_path / name for name in ("microdit-scratch-old", "microdit-scratch-young", "other"))
    for folder in (old, young, other):
        folder.mkdir()
        (folder / "half.tar").write_bytes(b"half")
    for folder in (old, other):
        os.utime(folder, (0, 0))
    sweep_scratch.cache_clear()
    with open_store(s3_url).scratch("name") as path:
        assert path.parent.parent == tmp_path
    assert sorted(tmp_path.iterdir()) == [young, other]


def test_a_disk_file_is_synced_before_it_has_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, Path]] = []
    fsync, link = os.fsync, os.link

    def watched_fsync(descriptor: int) -> None:
        steps.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def watched_link(source: Path, target: Path) -> None:
        steps.append(("link", target))
        link(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "link", watched_link)
    root = tmp_path / "corpus"
    open_store(root).create("a/b/name", b"data")
    linked = steps.index(("link", root / "a/b/name"))
    before, after = steps[:linked], steps[linked + 1 :]
    assert {path for _, path in before[:-1]} >= {tmp_path, root, root / "a"}
    assert before[-1][1].name.startswith("name#")
    assert after == [("sync", root / "a/b")]


@pytest.mark.parametrize("url", ["ftp://host/x", "http://host/x"])
def test_an_unknown_scheme_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match=r"scheme '(ftp|http)' is not known.*s3://"):
        open_store(url)


@pytest.mark.parametrize("url", ["s3://", "az://container/x"])
def test_a_bucket_url_that_names_nothing_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(RequestError, match=url):
        open_store(url)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/a%20b")
    store.create("x", b"1")
    assert (tmp_path / "a b" / "x").read_bytes() == b"1"
