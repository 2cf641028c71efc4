"""Files on disks, the hub, buckets and web servers: what a pattern stands for, and what is listed."""

import hashlib
import os
import pickle
import time
from pathlib import Path

import boto3
import pytest
from huggingface_hub import constants

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.patterns import expand_braces, matcher
from microdit.pipeline.files.remote_file import RemoteFile
from tests.pipeline.helpers.remote_files import DATA, REPO, fetched, hasty, scratch
from tests.servers.hub import TOKEN, Hub, hub
from tests.servers.s3 import BUCKET

__all__ = ["hasty", "hub", "scratch"]


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
