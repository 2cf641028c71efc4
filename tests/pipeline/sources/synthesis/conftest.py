"""Pipelines and a hub for tests of the source `synthesize`."""

from pathlib import Path

import pytest

from tests.pipeline.helpers.tiny_pipelines import save_pipeline
from tests.servers.hub import hub

__all__ = ["hub"]


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion."""
    return save_pipeline("sd", tmp_path_factory.mktemp("models") / "tiny-sd")
