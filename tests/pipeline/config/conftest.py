"""A small config, as a tree and as a file."""

from pathlib import Path

import pytest
import yaml

TREE = {
    "name": "tried",
    "corpus": "somewhere",
    "sources": {"web": {"adapter": "urls", "list": "urls.tsv"}},
    "columns": {
        "captions/source": None,
        "latents/sd1.5-64": {"autoencoder": "demo", "resolution": 64},
        "text/minilm@source": {"encoder": "minilm"},
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(TREE))
    return file
