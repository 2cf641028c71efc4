"""Short pauses, a scratch folder and the bytes of a file, for tests of remote files."""

import random
from pathlib import Path

import pytest

from microdit.pipeline.files import download, transfer
from microdit.pipeline.files import hub as hub_files
from microdit.pipeline.files.download import local_copy
from microdit.pipeline.files.remote_file import RemoteFile

DATA = random.Random(5).randbytes(1_000_003)
REPO = "pixparse/cc12m-wds"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses to milliseconds."""
    monkeypatch.setattr(download, "PAUSE", 0.002)
    monkeypatch.setattr(download, "POLL", 0.02)
    monkeypatch.setattr(hub_files, "PAUSE", 0.002)
    monkeypatch.setattr(transfer, "READ_TIMEOUT", 5.0)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def fetched(file: RemoteFile, scratch: Path) -> bytes:
    """Read a file through a local copy, and check that none is left."""
    with local_copy(file, scratch) as path:
        assert path.parent == scratch
        found = path.read_bytes()
    assert list(scratch.iterdir()) == []
    return found
