"""Files of the hub: listings, gated repositories, a busy hub."""

import hashlib
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.find import list_files
from microdit.pipeline.files.remote_file import RemoteFile
from tests.pipeline.helpers.remote_files import DATA, REPO, fetched, hasty, scratch
from tests.servers.hub import TOKEN, Hub, hub

__all__ = ["hasty", "hub", "scratch"]


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
