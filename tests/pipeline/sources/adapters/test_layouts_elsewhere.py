"""Folders, JSON lines, TFRecords and split archives from a bucket, a web server and the hub, as from a folder."""

import json
import tarfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
import pytest

from microdit.pipeline.base.errors import RequestError
from tests.pipeline.helpers.dataset_archives import ingested, picture
from tests.pipeline.sources.adapters.test_layouts import example, framed, told
from tests.servers.files_server import FilesServer, files_server
from tests.servers.hub import Hub, hub
from tests.servers.s3 import BUCKET

__all__ = ["files_server", "hub"]

REPO = "some/pictures"
Files = Mapping[str, bytes]
Publish = Callable[[Files], str]
"""Put files somewhere; return the address of their folder."""


@pytest.fixture(params=["s3", "https", "hub"])
def publish(request: pytest.FixtureRequest) -> Publish:
    if request.param == "s3":
        prefix: str = request.getfixturevalue("s3_url")

        def to_bucket(files: Files) -> str:
            for name, data in files.items():
                boto3.client("s3").put_object(Bucket=BUCKET, Key=f"{prefix.rpartition('/')[2]}/{name}", Body=data)
            return prefix

        return to_bucket
    if request.param == "hub":
        server: Hub = request.getfixturevalue("hub")

        def to_hub(files: Files) -> str:
            server.add(REPO, {f"data set/{name}": data for name, data in files.items()}, kind="datasets")
            return f"hf://datasets/{REPO}/data set"

        return to_hub
    web: FilesServer = request.getfixturevalue("files_server")

    def to_web(files: Files) -> str:
        for name, data in files.items():
            web.add(f"data set/{name}", data)
        return f"{web.url}/data%20set"

    return to_web


def same_as_here(folder: Path, files: Files, address: str, options: dict[str, Any], option: str = "files") -> list[Any]:
    """Build from a folder and from elsewhere; return the rows, which are the same."""
    for name, data in files.items():
        path = folder / "data set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    found = []
    for number, root in enumerate((str(folder / "data set"), address)):
        (folder / str(number)).mkdir()
        images, captions = ingested(folder / str(number), options | {option: f"{root}{options[option]}"})
        found.append(
            ([row[:2] for row in told(images)], [row["sha256"] for row in images], [row["caption"] for row in captions])
        )
        assert not list((folder / str(number)).glob("scratch/microdit-*"))  # nothing is left of what was fetched
    assert found[0] == found[1]
    return found[1][0]


def test_json_lines(tmp_path: Path, publish: Publish) -> None:
    rows = [{"image": f"sub dir/{n}é#.jpg", "caption": f"red {n}"} for n in range(3)]
    files = {f"sub dir/{n}é#.jpg": picture(n) for n in range(2)}
    files["rows.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b"no json\n"
    options = {"adapter": "jsonl", "files": "/rows.jsonl"}
    found = same_as_here(tmp_path, files, publish(files), options)
    assert [what for _, what in found] == ["red 0", "red 1", "missing", "damaged_json"]


def test_tfrecords(tmp_path: Path, publish: Publish) -> None:
    good = [framed(example(image=picture(n), caption=f"red {n}")) for n in range(4)]
    damaged = bytearray(good[3])
    damaged[-8] ^= 1
    files = {"a-0.tfrecord": good[0] + good[1], "a-1.tfrecord": good[2] + bytes(damaged)}
    options = {"adapter": "tfrecord", "files": "/a-{0..1}.tfrecord"}
    found = same_as_here(tmp_path, files, publish(files), options)
    assert [what for _, what in found] == ["red 0", "red 1", "red 2", "damaged_member"]


def test_split_archives(tmp_path: Path, publish: Publish) -> None:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for n in range(3):
            for name, data in ((f"{n}.jpg", picture(n)), (f"{n}.txt", b"red %d" % n)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    whole = buffer.getvalue()
    files = {f"gen.tar.gz.0{n}": whole[n * 1500 : (n + 1) * 1500 if n < 2 else None] for n in range(3)}
    options = {"adapter": "webdataset", "files": "/gen.tar.gz.{00..02}"}
    found = same_as_here(tmp_path, files, publish(files), options)
    assert [what for _, what in found] == ["red 0", "red 1", "red 2"]


def test_folders(tmp_path: Path, publish: Publish) -> None:
    files = {f"{n % 2}/{n}.jpg": picture(n) for n in range(4)} | {f"{n % 2}/{n}.txt": b"red %d" % n for n in range(3)}
    files["table.jsonl"] = b'{"name": "0/0.jpg", "more": "long"}\n'
    address = publish(files)
    options = {"adapter": "folder", "files": "", "unit_inputs": 3}
    if address.startswith("http"):
        with pytest.raises(RequestError, match="a web server cannot be listed"):
            ingested(tmp_path, options | {"files": address})
        return
    found = same_as_here(tmp_path, files, address, options)
    assert [what for _, what in found] == ["red 0", "red 2", "red 1", ""]
