"""Files on disks, web servers and buckets: what a pattern stands for, and what is listed."""

import os
import pickle
from pathlib import Path

import boto3
import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from tests.pipeline.helpers.remote_files import DATA, fetched, hasty, scratch
from tests.servers.s3 import BUCKET

__all__ = ["hasty", "scratch"]


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
