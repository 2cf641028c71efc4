"""The store in a bucket alone: every operation under every kind of transient fault, its scratch files, its address."""

import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.storage import bucket as bucket_store
from microdit.pipeline.storage.bucket import sweep_scratch
from microdit.pipeline.storage.store import open_store
from tests.servers.faulty_s3 import BAD_DAY, KINDS, Fault, FaultyS3
from tests.servers.s3 import BUCKET

BIG = random.Random(1).randbytes(6 << 20)  # above the size at which uploads go in parts
NAMES = [f"many/{number:04d}" for number in range(1010)]  # more than a page


@pytest.fixture(scope="module")
def filled(s3_server: str) -> str:
    """A prefix with objects that tests only read."""
    url = f"s3://{BUCKET}/filled"
    store = open_store(url)
    store.create("small", b"small")
    with store.scratch("big") as path:
        path.write_bytes(BIG)
        store.publish({"big": path})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.create(name, b"x"), NAMES))
    return url


@pytest.fixture
def proxy(s3_server: str, filled: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy without faults yet, and a store with short pauses."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    monkeypatch.setattr(bucket_store, "PAUSE", 0.01)
    monkeypatch.setattr(bucket_store, "LONGEST_PAUSE", 0.05)
    with FaultyS3(s3_server, seed, rates={}, stall_seconds=[3.0]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def create(url: str, filled: str) -> None:
    store = open_store(url)
    store.create("folder/name", b"ours")
    assert store.get("folder/name") == b"ours"


def create_what_another_wrote(url: str, filled: str) -> None:
    with pytest.raises(FileExistsError):
        open_store(filled).create("small", b"ours")
    assert open_store(filled).get("small") == b"small"


def publish(url: str, filled: str, data: bytes = b"whole") -> None:
    store = open_store(url)
    with store.scratch("attempt.tar") as path:
        path.write_bytes(data)
        store.publish({"attempt.tar": path})
    assert [(item.name, item.size) for item in store.list()] == [("attempt.tar", len(data))]
    assert store.get("attempt.tar") == data


def publish_in_parts(url: str, filled: str) -> None:
    publish(url, filled, BIG)


def get(url: str, filled: str) -> None:
    assert open_store(filled).get("big") == BIG


def get_range(url: str, filled: str) -> None:
    assert open_store(filled).get_range("big", 1000, 2 << 20) == BIG[1000:][: 2 << 20]


def open_and_read(url: str, filled: str) -> None:
    with open_store(filled).open("big") as file:
        assert file.read(5 << 20) == BIG[: 5 << 20]
        assert file.read() == BIG[5 << 20 :]


def get_what_is_not_there(url: str, filled: str) -> None:
    with pytest.raises(FileNotFoundError):
        open_store(filled).get("never")


def exists(url: str, filled: str) -> None:
    assert open_store(filled).exists("small") and not open_store(filled).exists("never")


def listing(url: str, filled: str) -> None:
    assert [item.name for item in open_store(filled).list("many")] == NAMES


def delete(url: str, filled: str) -> None:
    store = open_store(url)
    for name in ("a", "b"):
        store.create(name, b"x")
    store.delete(["a", "never"])
    assert list(store.names()) == ["b"]


READING = [get, get_range, open_and_read, exists, listing, get_what_is_not_there]
WRITING = [create, create_what_another_wrote, publish, publish_in_parts, delete]
FAULTS = [Fault(kind, done) for kind in ("error_500", "error_503", "reset") for done in (False, True)]

CASES = [
    *((operation, fault) for operation in [*READING, *WRITING] for fault in FAULTS),
    *((operation, Fault("stall")) for operation in (get, listing, publish_in_parts)),
    *((create, Fault("stall", done)) for done in (False, True)),
    *((operation, Fault("cut_answer")) for operation in READING if operation is not exists),
    *((operation, Fault("cut_upload")) for operation in WRITING),
]


@pytest.mark.parametrize(
    ("operation", "fault"), CASES, ids=[f"{o.__name__}-{f.kind}{'-done' * f.done}" for o, f in CASES]
)
def test_a_fault_changes_no_answer(
    proxy: FaultyS3,
    s3_url: str,
    filled: str,
    operation: Callable[[str, str], None],
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fault.kind == "stall":
        monkeypatch.setattr(bucket_store, "READ_TIMEOUT", 2.0)
    proxy.script.extend([fault] * (1 if fault.kind == "stall" else 2))
    operation(s3_url, filled)
    assert list(proxy.faults) == [fault.kind]
    assert proxy.retries >= 1


@pytest.mark.parametrize("operation", [*READING, *WRITING], ids=lambda operation: operation.__name__)
def test_a_bucket_that_throttles_for_long_is_waited_for(
    proxy: FaultyS3, s3_url: str, filled: str, operation: Callable[[str, str], None]
) -> None:
    proxy.script.extend([Fault("error_503")] * 12)  # more than obstore bears
    operation(s3_url, filled)
    assert proxy.faults == {"error_503": 12}


@pytest.mark.parametrize("kind", ["error_500", "reset", "stall"])
def test_an_object_of_ours_whose_answer_was_lost_is_a_win(
    proxy: FaultyS3, s3_url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_store, "READ_TIMEOUT", 2.0 if kind == "stall" else 60.0)
    store = open_store(s3_url)
    proxy.script.append(Fault(kind, done=True))
    store.create("commit", b"ours")
    assert proxy.faults == {kind: 1} and proxy.requests["PUT"] >= 2
    with pytest.raises(FileExistsError):
        store.create("commit", b"ours")  # nothing was lost now: somebody was here before


def test_of_rivals_whose_answers_are_lost_one_wins(proxy: FaultyS3, s3_url: str) -> None:
    proxy.rates = {"error_500": 0.15, "reset": 0.15, "error_503": 0.1}
    racers, barrier = range(4), threading.Barrier(4)

    def race(racer: int) -> list[int]:
        store, won = open_store(s3_url), []
        for number in range(40):
            barrier.wait(60)
            try:
                store.create(f"raced/{number}", f"{racer}".encode())
            except FileExistsError:
                continue
            won.append(number)
        return won

    with ThreadPoolExecutor(4) as pool:
        wins = list(pool.map(race, racers))
    store = open_store(s3_url)
    assert sorted(number for won in wins for number in won) == list(range(40))
    assert all(store.get(f"raced/{number}") == f"{racer}".encode() for racer in racers for number in wins[racer])
    assert proxy.lost_answers > 0 and min(proxy.faults[kind] for kind in proxy.rates) > 0


def test_a_bad_day(proxy: FaultyS3, s3_url: str, filled: str) -> None:
    proxy.rates, proxy.stall_seconds = {kind: 3 * rate for kind, rate in BAD_DAY.items()}, [0.1]

    def some(worker: int) -> None:
        for operation in random.Random(proxy.seed + worker).sample([*READING, *WRITING] * 2, 14):
            operation(f"{s3_url}/{worker}-{os.urandom(4).hex()}", filled)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(4)))
        for day in range(1, 10):  # a kind of fault may not come on one day
            if set(proxy.faults) != set(KINDS) or not proxy.lost_answers:
                list(pool.map(some, range(4 * day, 4 * day + 4)))
    assert set(proxy.faults) == set(KINDS)
    assert proxy.retries > 0 and proxy.lost_answers > 0


def test_a_bucket_that_never_answers_is_given_up_sooner_than_one_that_did(
    proxy: FaultyS3, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_store, "FIRST_PATIENCE", 0.2)
    store = open_store(s3_url)
    store.create("name", b"x")
    proxy.rates = {"error_503": 1.0}
    with pytest.raises(OSError, match=rf"{s3_url}/name: \d+ tries to read it failed in .* s, the last with: .*503"):
        open_store(s3_url).get("name")
    tried = proxy.faults["error_503"]
    threading.Timer(1.0, lambda: proxy.rates.clear()).start()
    assert store.get("name") == b"x"
    assert proxy.faults["error_503"] > tried


def test_a_request_that_is_refused_is_not_repeated(proxy: FaultyS3, filled: str) -> None:
    store = open_store(filled)
    with pytest.raises(FileExistsError):
        store.create("small", b"ours")
    assert proxy.requests == {"PUT": 1, "GET": 1}
    with pytest.raises(FileNotFoundError):
        store.get("never")
    assert proxy.requests == {"PUT": 1, "GET": 2}


def test_a_listing_asks_once_for_a_thousand_names(proxy: FaultyS3, filled: str) -> None:
    assert list(open_store(filled).names("many")) == NAMES
    assert proxy.requests == {"LIST": 2}


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


@pytest.mark.parametrize("url", ["s3://", "az://container/x"])
def test_a_bucket_url_that_names_nothing_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(RequestError, match=url):
        open_store(url)


def test_the_region_is_that_of_boto3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert bucket_store.bucket_options("s3")["region"] == "us-east-1"
    (tmp_path / "config").write_text("[default]\nregion = eu-west-3\n[profile far]\nregion = ap-south-1\n")
    assert bucket_store.bucket_options("s3")["region"] == "eu-west-3"
    monkeypatch.setenv("AWS_PROFILE", "far")
    assert bucket_store.bucket_options("s3")["region"] == "ap-south-1"
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert "region" not in bucket_store.bucket_options("s3")  # obstore reads it


@pytest.mark.parametrize("prefix", ["a#b", "a?b", "a%20b", "a/b#1/c"])
def test_a_prefix_that_would_be_cut_or_decoded_is_refused(prefix: str) -> None:
    with pytest.raises(RequestError, match=r"prefix has [#?%], which programs read in different ways"):
        open_store(f"s3://bucket/{prefix}")


@pytest.mark.parametrize("name", ["a#b", "a?b", "a b", "a%20b", "a#1"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    store = open_store(tmp_path / name)
    store.create("one", b"1")
    assert (tmp_path / name / "one").read_bytes() == b"1" and [item.name for item in store.list()] == ["one"]
    quoted = quote(str(tmp_path / name))
    assert open_store(f"file://{quoted}").get("one") == b"1"
