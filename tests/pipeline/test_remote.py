"""Files from disks, the hub, buckets and web servers: what is listed, and downloads that everything happens to."""

import errno
import hashlib
import os
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import boto3
import obstore
import pytest
from huggingface_hub import constants

from pipeline import watch
from pipeline.errors import RequestError
from pipeline.sources import download, hub_files, transfer
from pipeline.sources.patterns import expand_braces, matcher
from pipeline.sources.remote import RemoteFile, list_files, local_copy, scratch_folder
from tests.files_server import FilesServer, files_server
from tests.hub import TOKEN, Hub, hub
from tests.pipeline.disks import grow, small_disk
from tests.s3 import BUCKET

__all__ = ["files_server", "hub"]

ROOT = Path(__file__).parent.parent.parent
DATA = random.Random(5).randbytes(1_000_003)
OTHER = random.Random(6).randbytes(1_000_003)
REPO = "pixparse/cc12m-wds"
COPY = """
import hashlib, sys
from pathlib import Path
from pipeline.sources.remote import RemoteFile, local_copy
name, url, size, etag, scratch = sys.argv[1:]
with local_copy(RemoteFile(name, url, int(size) if size else None, etag), Path(scratch)) as path:
    print(hashlib.sha256(path.read_bytes()).hexdigest(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of thousandths of a second."""
    monkeypatch.setattr(download, "PAUSE", 0.002)
    monkeypatch.setattr(download, "POLL", 0.02)
    monkeypatch.setattr(hub_files, "PAUSE", 0.002)
    monkeypatch.setattr(transfer, "READ_TIMEOUT", 5.0)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def fetched(file: RemoteFile, scratch: Path) -> bytes:
    """The bytes of a file; nothing of it is left."""
    with local_copy(file, scratch) as path:
        assert path.parent == scratch
        found = path.read_bytes()
    assert list(scratch.iterdir()) == []
    return found


def start_copy(file: RemoteFile, scratch: Path) -> "subprocess.Popen[str]":
    """Another process that downloads the file, prints its hash and reads it until its input ends."""
    size = "" if file.size is None else str(file.size)
    return subprocess.Popen(
        [sys.executable, "-c", COPY, file.name, file.url, size, file.etag, str(scratch)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for_part(scratch: Path, size: int) -> Path:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for part in scratch.glob("*.part"):
            if part.stat().st_size >= size:
                return part
        time.sleep(0.01)
    raise AssertionError("no download began")


# -- patterns --------------------------------------------------------------------------------------------------------


def test_braces() -> None:
    assert expand_braces("a-{08..11}.tar", "x") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{9..10}/{a,b,}", "x") == ["9/a", "9/b", "9/", "10/a", "10/b", "10/"]
    assert expand_braces("plain{0}{}", "x") == ["plain{0}{}"]
    for bad in ("{3..2}", "{0..9999999}", "{0..9999}{0..9999}"):
        with pytest.raises(RequestError, match=r"sources\.a\.files"):
            expand_braces(bad, "sources.a.files")


@pytest.mark.parametrize(
    ("pattern", "fits", "does_not"),
    [
        ("*.tar", ["a.tar", ".tar"], ["a/b.tar", "a.tar.gz"]),
        ("**/*.tar", ["a.tar", "a/b.tar", "a/b/c.tar"], ["a.zip"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a/c"]),
        ("p-?.[tz]*", ["p-1.tar", "p-2.zip"], ["p-10.tar", "p-/.tar", "p-1.rar"]),
        ("[!a]+(x)", ["b+(x)"], ["a+(x)", "bb(x)"]),
    ],
)
def test_wildcards(pattern: str, fits: list[str], does_not: list[str]) -> None:
    assert [name for name in fits + does_not if matcher(pattern).fullmatch(name)] == fits


# -- listing ---------------------------------------------------------------------------------------------------------


def test_local_files(tmp_path: Path) -> None:
    for name in ("a/part-10.tar", "a/part-2.tar", "b/part-1.tar", "b/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = list_files(f"{tmp_path}/*/part-*.tar", "x")
    assert [file.name for file in found.files] == ["a/part-2.tar", "a/part-10.tar", "b/part-1.tar"]
    assert found.files[0].size == 12
    assert list_files(f"{tmp_path}/{{a,b}}/part-*.tar", "x") == found == pickle.loads(pickle.dumps(found))
    assert list_files(f"file://{tmp_path}/b/note.txt", "x").files[0].name == "note.txt"
    with local_copy(found.files[0], tmp_path / "unused") as path:
        assert path == tmp_path / "a/part-2.tar"
    assert path.exists()
    assert not (tmp_path / "unused").exists()

    os.utime(path)  # a copy elsewhere has another time, and is the same data set
    assert list_files(f"{tmp_path}/*/part-*.tar", "x").identity == found.identity
    path.write_bytes(b"longer than before")
    assert list_files(f"{tmp_path}/*/part-*.tar", "x").identity != found.identity


def test_a_local_name_may_hold_wildcards(tmp_path: Path) -> None:
    (tmp_path / "a[1]{2,3}*.tar").write_bytes(b"")
    assert list_files(str(tmp_path / "a[1]{2,3}*.tar"), "x").files[0].name == "a[1]{2,3}*.tar"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{tmp}/none-*.tar", "no file matches .*none-.*; check the path"),
        ("{tmp}/a-{{1..3}}.tar", "no file matches .*a-2.tar"),
        ("{tmp}", r"is a folder; expected files, for example .*/\*\.tar"),
        ("ftp://host/a.tar", "scheme 'ftp' is not known; give a local path, or one of https://"),
        ("https://", "names no server"),
        ("https://host/a-*.tar", r"cannot be listed; write the names as in part-\{000..099\}\.tar"),
        ("s3://bucket", r"expected s3://bucket/path"),
        ("hf://datasets/alone/*.tar", "expected hf://datasets/OWNER/NAME/FILES"),
    ],
)
def test_patterns_that_stand_for_nothing(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "a-1.tar").write_bytes(b"")
    with pytest.raises(RequestError, match=message) as error:
        list_files(pattern.format(tmp=tmp_path), "sources.mine.files")
    assert str(error.value).startswith("sources.mine.files = ")


def test_web_files() -> None:
    found = list_files("https://host/set/{b,a}-{9..10}.tar?v=1", "x")
    assert [file.name for file in found.files] == ["a-9.tar", "a-10.tar", "b-9.tar", "b-10.tar"]
    assert found.files[0].url == "https://host/set/a-9.tar?v=1"
    assert [f.name for f in list_files("http://host/get?id={1..2}", "x").files] == ["host/get?id=1", "host/get?id=2"]
    assert list_files("https://host/val%202014.zip", "x").files[0].name == "val 2014.zip"


def test_hub_files(hub: Hub) -> None:
    """More than a page of them, at the commit that the branch has now, with sizes and hashes."""
    hub.page = 100
    files = {f"train-{number}.tar": b"%d" % number for number in range(250)}
    commit = hub.add(REPO, {**files, "deep/er/x.parquet": b"x", "_info.json": b"{}"}, kind="datasets")
    found = list_files(f"hf://datasets/{REPO}/train-*.tar", "x")
    assert [file.name for file in found.files] == list(files)
    assert found.identity["repo"] == REPO
    assert found.identity["revision"] == commit
    assert found.files[10] == RemoteFile(
        "train-10.tar", f"hf://datasets/{REPO}@{commit}/train-10.tar", 2, hashlib.sha256(b"10").hexdigest()
    )
    assert sum("/tree/" in request.path for request in hub.requests) == 3
    asked = len(hub.requests)
    assert list_files(f"hf://datasets/{REPO}/train-*.tar", "x") is found
    assert len(hub.requests) == asked
    later = hub.add(REPO, {"train-0.tar": b"other"}, kind="datasets")
    for revision in (commit, commit[:8]):
        assert len(list_files(f"hf://datasets/{REPO}@{revision}/train-{{0..9}}.tar", "x").files) == 10
    assert list_files(f"hf://datasets/{REPO}@main/*.tar", "x").identity["revision"] == later
    assert list_files(f"hf://datasets/{REPO}@{commit}/**/*.parquet", "x").files[0].name == "deep/er/x.parquet"
    hub.add(REPO, {"default/a.parquet": b"a"}, kind="datasets", branch="refs/convert/parquet")
    assert len(list_files(f"hf://datasets/{REPO}@refs/convert/parquet/default/*.parquet", "x").files) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("hf://datasets/no/body/*.tar", "the hub has no data set no/body .* check the name, or run `hf auth login`"),
        ("hf://datasets/a/open@v9/*.tar", "a/open has no revision 'v9'; give a branch, a tag or a commit hash"),
        ("hf://datasets/a/open/*.zip", r"a/open has no file \*\.zip at [0-9a-f]{12}; see https://"),
        ("hf://datasets/a/open/nowhere/*.tar", r"has no file nowhere/\*\.tar"),
        ("hf://datasets/a/open/a-{1..2}.tar", r"has no file a-2\.tar"),
        ("hf://datasets/a/gated/*.tar", "a/gated is gated, and there is no token .*: accept them at https://"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, pattern: str, message: str) -> None:
    hub.add("a/open", {"a-1.tar": b"1"}, kind="datasets")
    hub.add("a/gated", {"a-1.tar": b"1"}, kind="datasets", gated=True)
    with pytest.raises(RequestError, match=message) as error:
        list_files(pattern, "sources.mine.files")
    assert str(error.value).startswith("sources.mine.files = ")
    assert "\n" not in str(error.value)


def test_a_gated_repository(hub: Hub, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("a/gated", {"a-1.tar": DATA}, kind="datasets", gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(RequestError, match="your token's account has not accepted its terms"):
        list_files("hf://datasets/a/gated/*.tar", "x")
    with (
        pytest.raises(RequestError, match=r"a-1\.tar: the hub refuses it \(403 .*has not accepted its terms"),
        local_copy(RemoteFile("a-1.tar", f"hf://datasets/a/gated@{commit}/a-1.tar"), scratch),
    ):
        raise AssertionError
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.requests.clear()
    assert fetched(list_files("hf://datasets/a/gated/*.tar", "x").files[0], scratch) == DATA
    assert {r.token for r in hub.requests if not r.path.startswith("/cdn/")} == {TOKEN}
    assert {r.token for r in hub.requests if r.path.startswith("/cdn/")} == {""}, "the token went to the CDN"


def test_a_busy_hub(hub: Hub) -> None:
    hub.add(REPO, {"a.tar": b"1"}, kind="datasets")
    hub.busy, began = [429, 503], time.monotonic()
    assert len(list_files(f"hf://datasets/{REPO}/*.tar", "x").files) == 1
    assert time.monotonic() - began >= 2


def test_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RequestError, match=r"the hub does not answer at http://127.*refused; check the connection"):
        list_files("hf://datasets/a/b/*.tar", "sources.mine.files")


def test_bucket_files(s3_url: str, scratch: Path) -> None:
    client, prefix = boto3.client("s3"), s3_url.split("/")[-1]
    for name in ("deep/part-10.tar", "deep/part-9.tar", "a.txt"):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=DATA[: 3 * len(name)])
    found = list_files(f"{s3_url}/**/part-*.tar", "x")
    assert [file.name for file in found.files] == ["deep/part-9.tar", "deep/part-10.tar"]
    assert [file.size for file in found.files] == [45, 48]
    assert fetched(found.files[1], scratch) == DATA[:48]
    with pytest.raises(RequestError, match=r"no object matches s3://.*/\*\.zip"):
        list_files(f"{s3_url}/*.zip", "x")
    with pytest.raises(RequestError, match="the bucket cannot be listed"):
        list_files("s3://microdit-none/*.zip", "x")
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/deep/part-9.tar", Body=b"x" * 45)
    with pytest.raises(OSError, match="another file than when it was listed"), local_copy(found.files[0], scratch):
        raise AssertionError
    client.delete_object(Bucket=BUCKET, Key=f"{prefix}/deep/part-9.tar")
    with pytest.raises(FileNotFoundError, match="not there any more"), local_copy(found.files[0], scratch):
        raise AssertionError


# -- downloads -------------------------------------------------------------------------------------------------------


def test_hub_downloads(hub: Hub, scratch: Path) -> None:
    """Cut, throttled, out of order and with a wrong byte: the file is what was listed, its bytes came once."""
    hub.add(REPO, {"a/x.tar": DATA, "small.json": b"{}", "empty.tar": b""}, kind="datasets")
    hub.faults["x.tar"] = [("cut", 300_000), ("status", 429), ("status", 500), ("cut", 200_000)]
    files = {file.name: file for file in list_files(f"hf://datasets/{REPO}/**", "x").files}
    began = time.monotonic()
    assert fetched(files["a/x.tar"], scratch) == DATA
    assert time.monotonic() - began >= 1
    assert hub.ranges("x.tar") == [None, "bytes=300000-", "bytes=500000-"]
    assert fetched(files["small.json"], scratch) == b"{}"
    assert fetched(files["empty.tar"], scratch) == b""
    hub.faults["x.tar"] = [("other", 7)]
    assert fetched(files["a/x.tar"], scratch) == DATA
    hub.faults["x.tar"] = [("other", 7)] * 20
    with (
        pytest.raises(OSError, match=r"given up after 8 tries .*sha256 is not the one"),
        local_copy(files["a/x.tar"], scratch),
    ):
        raise AssertionError


def test_a_signed_link(files_server: FilesServer, scratch: Path) -> None:
    """It expires on the way; the new one, which differs in its signature, goes on where the old one stopped."""
    files_server.add("o1/v/t6/sa_000020.tar", DATA, faults=[("cut", 300_000), ("status", 403)])
    with (
        pytest.raises(RequestError) as error,
        local_copy(RemoteFile("sa_000020.tar", files_server.signed("o1/v/t6/sa_000020.tar")), scratch),
    ):
        raise AssertionError
    assert "sa_000020.tar" in str(error.value)
    assert "the link has expired" in str(error.value)
    assert "SECRET" not in str(error.value)
    with (
        pytest.raises(RequestError, match="get new links"),
        local_copy(RemoteFile("sa_000020.tar", files_server.signed("o1/v/t6/sa_000020.tar", -60)), scratch),
    ):
        raise AssertionError
    again = files_server.signed("o1/v/t6/sa_000020.tar", 999)
    assert fetched(RemoteFile("sa_000020.tar", again.replace("127.0.0.1", "localhost")), scratch) == DATA
    assert files_server.ranges("o1/v/t6/sa_000020.tar") == [None, *["bytes=300000-"] * 3]


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"modified": None},
        {"etag": None},
        {"etag": 'W/"weak"'},
        {"ranges": False},
        {"if_range": False},
        {"if_range": False, "etag": None},
    ],
    ids=str,
)
def test_a_file_that_changes_on_the_way(files_server: FilesServer, scratch: Path, about: dict) -> None:
    """Never the beginning of one and the end of the other."""
    url = files_server.add("x.tar", DATA, faults=[("cut", 400_000), ("become", OTHER)], **about)
    assert fetched(RemoteFile("x.tar", url), scratch) == OTHER


def test_a_file_that_becomes_shorter(files_server: FilesServer, scratch: Path) -> None:
    url = files_server.add("x.tar", DATA, etag=None, modified=None, faults=[("cut", 400_000), ("become", b"short")])
    assert fetched(RemoteFile("x.tar", url), scratch) == b"short"


@pytest.mark.parametrize("about", [{}, {"ranges": False}, {"etag": None, "modified": None}], ids=str)
def test_a_complete_copy_that_is_left(files_server: FilesServer, scratch: Path, about: dict) -> None:
    """After an error while it was read: the server is asked whether it is still the file, for a byte of it."""
    file = RemoteFile("x.tar", files_server.add("x.tar", DATA, **about))
    with pytest.raises(ZeroDivisionError), local_copy(file, scratch) as path:
        raise ZeroDivisionError
    assert path.read_bytes() == DATA
    assert fetched(file, scratch) == DATA
    if not about:
        assert [asked.sent for asked in files_server.asked] == [len(DATA), 1]
    with pytest.raises(ZeroDivisionError), local_copy(file, scratch):
        raise ZeroDivisionError
    files_server.files["x.tar"].faults = [("become", OTHER[:-1])]
    assert fetched(file, scratch) == OTHER[:-1]


def test_a_complete_copy_of_a_hub_file_costs_nothing(hub: Hub, scratch: Path) -> None:
    hub.add(REPO, {"x.tar": DATA}, kind="datasets")
    file = list_files(f"hf://datasets/{REPO}/x.tar", "x").files[0]
    with pytest.raises(ZeroDivisionError), local_copy(file, scratch):
        raise ZeroDivisionError
    asked = len(hub.requests)
    assert fetched(file, scratch) == DATA
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([("lie", 5000)], [None, "bytes=1000003-"]),
        ([("status", 503), ("status", 408)], [None, None, None]),
        ([("silent", 250_000)], [None, "bytes=250000-"]),
        ([("slow", 2000)], None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_web_downloads(
    files_server: FilesServer, scratch: Path, monkeypatch: pytest.MonkeyPatch, faults: list, ranges: list
) -> None:
    monkeypatch.setattr(transfer, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(download, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(download, "SLOW_BYTES", 100_000)
    url = files_server.add("x.tar", DATA, faults=faults)
    assert fetched(RemoteFile("x.tar", url), scratch) == DATA
    if ranges is None:  # the slow connection was given up for another
        assert len(files_server.asked) == 2
        assert files_server.asked[0].sent + files_server.asked[1].sent < 1.5 * len(DATA)
    else:
        assert files_server.ranges("x.tar")[: len(ranges)] == ranges


def test_as_long_as_there_is_headway(files_server: FilesServer, scratch: Path) -> None:
    url = files_server.add("x.tar", DATA, faults=[("cut", 70_000)] * 14)
    assert fetched(RemoteFile("x.tar", url), scratch) == DATA
    assert files_server.ranges("x.tar")[14] == "bytes=980000-"
    # without ranges each try begins again and gets no further: that is no headway
    files_server.files["x.tar"].ranges, files_server.files["x.tar"].faults = False, [("cut", 70_000)] * 30
    with (
        pytest.raises(OSError, match=r"given up after 8 tries without headway.* 1000003 bytes"),
        local_copy(RemoteFile("x.tar", url), scratch),
    ):
        raise AssertionError


def test_sizes_that_do_not_agree(files_server: FilesServer, scratch: Path) -> None:
    url = files_server.add("x.tar", DATA)
    with (
        pytest.raises(OSError, match=r"999 bytes were expected, the server says 1000003"),
        local_copy(RemoteFile("x.tar", url, 999), scratch),
    ):
        raise AssertionError
    files_server.files["x.tar"].length = False
    with (
        pytest.raises(OSError, match=r"of 2000000 bytes; the last one: the file has 1000003 bytes only"),
        local_copy(RemoteFile("x.tar", url, 2_000_000), scratch),
    ):
        raise AssertionError
    assert fetched(RemoteFile("x.tar", url), scratch) == DATA
    assert fetched(RemoteFile("x.tar", url, len(DATA)), scratch) == DATA


def test_what_a_web_server_does_not_have(files_server: FilesServer, scratch: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"the server has no http://.*/x\.tar \(404\)"),
        local_copy(RemoteFile("x.tar", f"{files_server.url}/x.tar?oh=SECRET"), scratch),
    ):
        raise AssertionError
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x.tar?oh=SECRET"
        with (
            pytest.raises(OSError, match=r"given up .* refused; check the connection") as error,
            local_copy(RemoteFile("x.tar", url), scratch),
        ):
            raise AssertionError
    assert "SECRET" not in str(error.value)


def test_headway_is_told(files_server: FilesServer, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch that ends hung workers hears of bytes that come."""
    told: list[float] = []
    monkeypatch.setattr(watch, "_timeout", 1e9)
    monkeypatch.setattr(watch, "_wound", -1e9)
    monkeypatch.setattr(watch, "_wind", told.append)
    url = files_server.add("x.tar", DATA, faults=[("slow", 100_000)])
    assert fetched(RemoteFile("x.tar", url), scratch) == DATA
    assert len(told) >= 5


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["hub", "web"])
def test_a_killed_download_goes_on(where: str, request: pytest.FixtureRequest, scratch: Path) -> None:
    """SIGKILL in the middle: the next process asks for the rest only."""
    if where == "hub":
        hub: Hub = request.getfixturevalue("hub")
        hub.add(REPO, {"x.tar": DATA}, kind="datasets")
        hub.faults["x.tar"] = [("slow", 10_000)]
        file = list_files(f"hf://datasets/{REPO}/x.tar", "x").files[0]
    else:
        server: FilesServer = request.getfixturevalue("files_server")
        file = RemoteFile("x.tar", server.add("x.tar", DATA, faults=[("slow", 10_000)]))
    process = start_copy(file, scratch)
    part = wait_for_part(scratch, 200_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    had = part.stat().st_size
    assert 200_000 <= had < len(DATA)
    assert fetched(file, scratch) == DATA
    ranges = hub.ranges("x.tar") if where == "hub" else server.ranges("x.tar")
    assert sorted(ranges, key=str) == sorted([None, f"bytes={had}-"], key=str)


def test_a_bucket_download_goes_on(s3_url: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks in its third block: what came before is not asked for again."""
    boto3.client("s3").put_object(Bucket=BUCKET, Key=f"{s3_url.split('/')[-1]}/x.tar", Body=DATA)
    file = list_files(f"{s3_url}/x.tar", "x").files[0]
    asked: list[int] = []

    def get(bucket: object, key: str, *, options: dict) -> object:
        asked.append(options["range"][0])
        if asked == [0, 300_000, 600_000]:
            raise KeyboardInterrupt
        if asked[3:] == [600_000]:
            raise transfer.exceptions.GenericError("in passing")
        return obstore.get(bucket, key, options=options)

    monkeypatch.setattr(transfer, "BLOCK", 300_000)
    monkeypatch.setattr(transfer, "obstore", SimpleNamespace(get=get))
    with pytest.raises(KeyboardInterrupt), local_copy(file, scratch):
        raise AssertionError
    assert fetched(file, scratch) == DATA
    assert asked == [0, 300_000, *[600_000] * 3, 900_000]


def test_two_processes_want_the_same_file(files_server: FilesServer, scratch: Path) -> None:
    """One downloads, both read, the last one removes it."""
    file = RemoteFile("x.tar", files_server.add("x.tar", DATA, faults=[("slow", 50_000)]))
    first, second = (start_copy(file, scratch) for _ in range(2))
    for process in (first, second):
        assert process.stdout is not None
        assert process.stdout.readline().strip() == hashlib.sha256(DATA).hexdigest()
    first.communicate()
    assert [path.read_bytes() for path in scratch.glob("*.tar")] == [DATA], "the other one still reads it"
    second.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert list(scratch.iterdir()) == []
    assert sum(asked.sent for asked in files_server.asked) <= len(DATA) + 1


def test_the_one_that_waits_takes_over(files_server: FilesServer, scratch: Path) -> None:
    file = RemoteFile("x.tar", files_server.add("x.tar", DATA, faults=[("slow", 10_000)]))
    process = start_copy(file, scratch)
    wait_for_part(scratch, 100_000)
    second = start_copy(file, scratch)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    assert second.communicate()[0].strip() == hashlib.sha256(DATA).hexdigest()
    assert list(scratch.iterdir()) == []


def test_leftovers_are_swept(files_server: FilesServer, scratch: Path) -> None:
    """Those that are old, ours and nobody's: not what is read, and nothing else in the folder."""
    urls = [files_server.add(f"{name}.tar", DATA) for name in ("old", "read", "new")]
    kept: list[Path] = []
    for url in urls:
        with pytest.raises(ZeroDivisionError), local_copy(RemoteFile(url[-7:], url), scratch) as path:
            raise ZeroDivisionError
        kept.append(path)
    (scratch / "thesis.tar.part").write_bytes(b"years of work")
    (scratch / "microdit-scratch-x").mkdir()
    with local_copy(RemoteFile(urls[1][-7:], urls[1]), scratch):
        for path in scratch.iterdir():
            if not path.name.endswith("new.tar"):
                os.utime(path, (time.time() - 50 * 3600,) * 2)
        download._sweep.cache_clear()
        download._sweep(scratch)
        assert [path.exists() for path in kept] == [False, True, True]
    names = {path.name for path in scratch.iterdir()}
    assert {"thesis.tar.part", "microdit-scratch-x"} <= names
    assert not any("old.tar" in name or "read.tar" in name for name in names)


# -- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "512k") as disk:
        yield disk


@pytest.mark.parametrize("length", [True, False])
def test_a_disk_that_is_full(disk: Path, files_server: FilesServer, length: bool) -> None:
    """Told before the first byte where the size is known; with room again it goes on."""
    file = RemoteFile("x.tar", files_server.add("x.tar", DATA, length=length))
    with (
        pytest.raises(
            OSError, match=r"no room in the scratch folder .*/disk for x\.tar.*set resources\.scratch"
        ) as error,
        local_copy(file, disk),
    ):
        raise AssertionError
    assert error.value.errno == errno.ENOSPC
    grow(disk, "8m")
    assert fetched(file, disk) == DATA
    if not length:
        assert files_server.ranges("x.tar")[1] not in (None, "bytes=0-")


def test_a_file_that_may_not_grow(files_server: FilesServer, scratch: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", COPY, "x.tar", files_server.add("x.tar", DATA), "", "", str(scratch)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
    )
    assert "no room in the scratch folder" in found.stderr
    assert "[Errno 28]" in found.stderr
    assert fetched(RemoteFile("x.tar", f"{files_server.url}/x.tar"), scratch) == DATA
    assert files_server.ranges("x.tar") == [None, "bytes=400000-"]


def test_a_scratch_folder_that_cannot_be(files_server: FilesServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    file = RemoteFile("x.tar", files_server.add("x.tar", DATA))
    with (
        pytest.raises(RequestError, match=r"scratch folder .*/file/x: it cannot be made .*set resources\.scratch"),
        local_copy(file, tmp_path / "file" / "x"),
    ):
        raise AssertionError


def test_the_default_scratch_folder() -> None:
    assert scratch_folder(None).name == f"microdit-{os.getuid()}"
    assert scratch_folder("/data/scratch") == Path("/data/scratch")
