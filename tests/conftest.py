"""Options and fixtures shared by all tests."""

import os

import pytest

from tests.servers.s3 import corpus_url, s3_server, s3_url

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: more threads move the last bits of bfloat16


__all__ = ["corpus_url", "s3_server", "s3_url"]


pytest.register_assert_rewrite("tests.miniatures", "tests.pipeline")  # what test files share asserts, too


@pytest.fixture(autouse=True)
def no_narrow_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take COLUMNS away, which xdist gives its workers: tables would be cut to it."""
    monkeypatch.delenv("COLUMNS", raising=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-dir", metavar="DIR", help="run the parity test on this set, not on tests/data/parity*")
    parser.addoption(
        "--openclip-dir", metavar="DIR", help="run the openclip test on this set, not on tests/data/openclip"
    )


# the files of the most seconds first: whoever comes to its end early finds something left to do
LONG = [
    *("engine/test_build.py", "tests/test_demo.py", "tests/test_readme.py", "engine/test_cluster.py"),
    *("tests/test_tutorial.py", "tests/test_extending.py"),
    *("config/test_shipped_configs.py", "tests/test_benchmarks.py", "sources/test_miniatures.py"),
    *("cli/test_app.py", "trainer/test_resume.py", "trainer/test_sharding.py", "trainer/test_shipped_recipes.py"),
    *("trainer/test_train.py", "trainer/test_not_finite.py", "trainer/test_legs.py", "trainer/test_command.py"),
    *("monitoring/test_sample_sheets.py", "cli/test_demo_evaluation.py", "trainer/test_compile.py"),
    *("base/test_liveness.py", "model/test_network.py", "model/test_text_to_image.py", "storage/test_bucket.py"),
    *("scores/test_registry.py", "tests/test_package.py", "tests/test_api.py", "access/test_doors.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(LONG) if item.path.as_posix().endswith(f"/{name}")), len(LONG))

    items.sort(key=place)
