"""Options shared by all tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-dir", metavar="DIR", help="run the parity test on this set, not on tests/data/parity*")
    parser.addoption(
        "--openclip-dir", metavar="DIR", help="run the openclip test on this set, not on tests/data/openclip"
    )
