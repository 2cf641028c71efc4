"""Options and fixtures shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: more threads move the last bits of bfloat16

import pytest

from tests.s3 import corpus_url, s3_server, s3_url

__all__ = ["corpus_url", "s3_server", "s3_url"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-dir", metavar="DIR", help="run the parity test on this set, not on tests/data/parity*")
    parser.addoption(
        "--openclip-dir", metavar="DIR", help="run the openclip test on this set, not on tests/data/openclip"
    )
