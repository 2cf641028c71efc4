"""A storage that does not let exactly one writer win is refused before anything is written."""

import errno
import os
import time
from pathlib import Path

import pytest

from microdit.pipeline.base.errors import RequestError
from microdit.pipeline.corpus.corpus import Corpus
from tests.servers.faulty_s3 import FaultyS3


@pytest.mark.parametrize(
    "conditions, message",
    [("ignored", "it overwrote an object"), ("refused", "asked to write only where nothing is .*501")],
)
def test_a_bucket_without_conditional_writes_is_refused(
    s3_server: str, s3_url: str, monkeypatch: pytest.MonkeyPatch, conditions: str, message: str
) -> None:
    with FaultyS3(s3_server, 0, rates={}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert Corpus.create(s3_url, "sound").name == "sound"
        before = {item.name for item in Corpus.open(s3_url).store.list()}
        assert before == {"corpus.json"}  # the probe is gone
        proxy.conditions = conditions
        began = time.monotonic()
        for url in (s3_url, f"{s3_url}-new"):
            with pytest.raises(RequestError, match=message):
                Corpus.create(url, "another")
        assert time.monotonic() - began < 10
        assert Corpus.open(s3_url).name == "sound"
        with pytest.raises(RequestError, match=r"no corpus\.json"):
            Corpus.open(f"{s3_url}-new")


@pytest.mark.parametrize("call", ["link", "fsync"])
def test_a_folder_without_hard_links_or_syncs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM if call == "link" else errno.EINVAL, "Operation not permitted")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(RequestError, match=r"no hard links, or cannot sync a folder .*use a folder on a local disk"):
        Corpus.create(tmp_path / "corpus", "c")
    assert not (tmp_path / "corpus/corpus.json").exists()
