"""Fixtures of the model's tests."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
