from pathlib import Path

import pytest

from microdit.model.text_to_image import MicroDiTPipeline
from tests.model.tiny import write_run
from tests.servers.hub import hub

__all__ = ["hub"]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def pipe(run: Path) -> MicroDiTPipeline:
    pipe = MicroDiTPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    return pipe
