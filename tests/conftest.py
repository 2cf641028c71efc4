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


# the longest first: whoever comes to its end early finds something left to do
LONG = [
    *("test_demo.py", "test_readme.py", "pipeline/test_cluster.py", "test_engine.py", "test_benchmarks.py"),
    *("test_miniatures.py", "test_train.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(LONG) if item.path.as_posix().endswith(f"/{name}")), len(LONG))

    items.sort(key=place)
