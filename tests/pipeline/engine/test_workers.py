"""A node with other software than the driver's is refused: its samples would mix with others under one fingerprint."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from microdit.pipeline.base.errors import CredentialsExpired, RequestError
from microdit.pipeline.base.versions import differences, versions
from microdit.pipeline.engine import workers
from microdit.pipeline.stages.stage import Task
from tests.pipeline.helpers.fake_stages import source_words
from tests.pipeline.helpers.small_corpus import REF, make_corpus, write_images


def test_nodes_with_other_software_are_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    corpus.store.create("probes/one", b"")
    context = workers.BuildContext(corpus, "probes/one", 600.0)
    workers.check_fits(context)
    for name, version in (("code", "0123456789ab"), ("torch", "1.0.0"), ("diffusers", "0.1")):
        other = replace(context, probe="probes/two", versions=versions() | {name: version})
        message = f"{name} {re.escape(versions()[name])} there, {version} here.*the same on all nodes"
        with pytest.raises(RequestError, match=message):
            workers.check_fits(other)
    with pytest.raises(RequestError, match="does not see this folder"):
        workers.check_fits(replace(context, probe="probes/three"))


def test_commits_say_what_made_them(tmp_path: Path) -> None:
    commit = write_images(make_corpus(tmp_path), REF)
    assert commit.software == versions() and {"microdit", "torch", "code"} <= commit.software.keys()


def test_kinds_of_one_version_are_equal() -> None:
    assert differences({"torch": "2.13.0+cpu"}, {"torch": "2.13.0+cu128"}) == []
    assert differences({"torch": "2.13.0"}, {}) == ["torch none there, 2.13.0 here"]


def test_a_gpu_that_torch_cannot_use_is_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*size: int, device: str) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be")

    monkeypatch.setattr(torch, "zeros", broken)
    assert workers.gpu_fault([]) is None
    fault = workers.gpu_fault(["0"])
    assert fault is not None
    assert re.search(r"has GPU 0 as Ray says, and torch .* cannot use it: CUDA error: .* encountered$", fault)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    assert workers.gpu_fault(["0"]) is None


def test_expired_credentials_are_told_without_another_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path)

    def expired(*names: object) -> bool:
        raise CredentialsExpired("s3://x: the credentials have expired", may_come=True)

    monkeypatch.setattr(type(corpus.store), "exists", expired)
    ended = workers.run_stage(source_words(), corpus, Task(REF, {"captions/source": 0}))
    assert ended.error is not None and ended.error.credentials_expired and not ended.written and not ended.existing
