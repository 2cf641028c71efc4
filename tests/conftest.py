"""Options and fixtures shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: more threads move the last bits of bfloat16

import pytest

from tests.s3 import corpus_url, s3_server, s3_url

__all__ = ["corpus_url", "s3_server", "s3_url"]

pytest.register_assert_rewrite("tests.miniatures", "tests.pipeline")  # what test files share asserts, too


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-dir", metavar="DIR", help="run the parity test on this set, not on tests/data/parity*")
    parser.addoption(
        "--openclip-dir", metavar="DIR", help="run the openclip test on this set, not on tests/data/openclip"
    )


# the files of the most seconds first: whoever comes to its end early finds something left to do
LONG = [
    *("pipeline/test_engine.py", "tests/test_demo.py", "tests/test_readme.py", "pipeline/test_cluster.py"),
    *("pipeline/test_shipped_configs.py", "tests/test_benchmarks.py", "pipeline/test_miniatures.py"),
    *("pipeline/test_cli.py", "trainer/test_train.py", "trainer/test_parallel.py", "trainer/test_recipes.py"),
    *("trainer/test_drawing.py", "trainer/test_evaluate.py", "trainer/test_compile.py", "pipeline/test_watch.py"),
    *("model/test_network.py", "model/test_pipeline.py", "pipeline/test_store_faults.py", "pipeline/test_scorers.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(LONG) if item.path.as_posix().endswith(f"/{name}")), len(LONG))

    items.sort(key=place)
