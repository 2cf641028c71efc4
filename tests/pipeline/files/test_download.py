"""Downloads from the hub, buckets and web servers, through every kind of fault."""

import errno
import hashlib
import os
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

from microdit.pipeline.base import liveness as watch
from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.files import download, transfer
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import RemoteFile
from tests.pipeline.helpers.remote_files import DATA, REPO, fetched, hasty, scratch
from tests.pipeline.helpers.small_disks import grow, small_disk
from tests.servers.files_server import FilesServer, files_server
from tests.servers.hub import Hub, hub
from tests.servers.s3 import BUCKET

__all__ = ["files_server", "hasty", "hub", "scratch"]
ROOT = Path(__file__).parents[3]
OTHER = random.Random(6).randbytes(1_000_003)

COPY = """
import hashlib, sys
from pathlib import Path
from microdit.pipeline.files.remote_file import RemoteFile
from microdit.pipeline.files.download import local_copy
name, url, size, etag, scratch = sys.argv[1:]
with local_copy(RemoteFile(name, url, int(size) if size else None, etag), Path(scratch)) as path:
    print(hashlib.sha256(path.read_bytes()).hexdigest(), flush=True)
    sys.stdin.read()
"""


def start_copy(file: RemoteFile, scratch: Path) -> "subprocess.Popen[str]":
    """Start a process that downloads the file, prints its hash and holds it until its input ends."""
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


# -- downloads -------------------------------------------------------------------------------------------------------
def test_hub_downloads(hub: Hub, scratch: Path) -> None:
    """Truncated, throttled, out of order and with a wrong byte: the file is the listed one, its bytes came once."""
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
    """It expires during the download; with the new link, of another signature, the download resumes."""
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


def test_a_login_is_sent_and_not_shown(files_server: FilesServer, scratch: Path) -> None:
    url = files_server.add("a/1.tar", DATA).replace("http://", "http://me:s3cret@")
    [file] = list_files(url, "files").files
    assert "s3cret" not in file.name
    with local_copy(file, scratch) as path:
        assert path.read_bytes() == DATA
    assert [asked.login for asked in files_server.asked] == ["Basic bWU6czNjcmV0"]
    del files_server.files["a/1.tar"]
    with pytest.raises(FileNotFoundError) as raised, local_copy(file, scratch):
        pass
    assert "s3cret" not in str(raised.value)
    names = [one.name for one in list_files(url + "?sig=s3cret&part={1..2}", "files").files]
    assert len(names) == 2 and "s3cret" not in "".join(names)


def test_a_file_that_becomes_shorter(files_server: FilesServer, scratch: Path) -> None:
    url = files_server.add("x.tar", DATA, etag=None, modified=None, faults=[("cut", 400_000), ("become", b"short")])
    assert fetched(RemoteFile("x.tar", url), scratch) == b"short"


@pytest.mark.parametrize("about", [{}, {"ranges": False}, {"etag": None, "modified": None}], ids=str)
def test_a_complete_copy_that_is_left(files_server: FilesServer, scratch: Path, about: dict) -> None:
    """After an error while it was read: one byte is requested to check that the file is unchanged."""
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
    """Received bytes count as progress for the watch that ends hung workers."""
    told: list[float] = []
    monkeypatch.setattr(watch, "_timeout", 1e9)
    monkeypatch.setattr(watch, "_armed_at", -1e9)
    monkeypatch.setattr(watch, "_arm", told.append)
    url = files_server.add("x.tar", DATA, faults=[("slow", 100_000)])
    assert fetched(RemoteFile("x.tar", url), scratch) == DATA
    assert len(told) >= 5


# -- processes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["hub", "web"])
def test_a_killed_download_goes_on(where: str, request: pytest.FixtureRequest, scratch: Path) -> None:
    """SIGKILL in the middle: the next process requests the rest only."""
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
    """It breaks in its third block: the first two are not requested again."""
    boto3.client("s3").put_object(Bucket=BUCKET, Key=f"{s3_url.split('/')[-1]}/x.tar", Body=DATA)
    file = list_files(f"{s3_url}/x.tar", "x").files[0]
    asked: list[int] = []

    def get(bucket: object, key: str, *, options: dict) -> object:
        asked.append(options["range"][0])
        if asked == [0, 300_000, 600_000]:
            raise KeyboardInterrupt
        if asked[3:] == [600_000]:
            raise transfer.exceptions.GenericError("transient")
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
    """Old copies that no process holds are removed; those in use and foreign files stay."""
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
    """Reported before the first byte if the size is known; with room again the download resumes."""
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
