"""Fixtures of the model's tests."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from microdit.model.text_to_image import MicroDiTPipeline
from tests.model.tiny import write_run
from tests.servers.hub import hub

__all__ = ["hub"]


@pytest.fixture
def bounded() -> Iterator[None]:
    """Let a test have 3 GiB of addresses more than there are, and 20 seconds of a processor."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30), before[1]))
    began = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - began < 20


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def pipe(run: Path) -> MicroDiTPipeline:
    pipe = MicroDiTPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    return pipe
