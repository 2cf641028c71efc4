"""Features of Inception, with random weights, as each of the tools makes them of the same pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from microdit.model.pretrained.hub import ModelFilesError
from microdit.model.pretrained.inception import Inception, inception_of, load_inception
from microdit.pipeline.evaluation.resizing import PROTOCOLS
from tests.pipeline.evaluation.references import DATA, random_inception, references


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_features_are_those_of_the_tool(protocol: str) -> None:
    expected = references()[f"features_{protocol}"]
    paths = sorted((DATA / "pictures").iterdir())
    assert len(paths) == len(expected)
    batch = np.stack([PROTOCOLS[protocol](np.array(Image.open(path).convert("RGB"))) for path in paths])
    with torch.inference_mode():
        features = random_inception()(torch.from_numpy(batch)).numpy()[:, ::8]
    assert np.abs(features - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_protocols_differ() -> None:
    """As the comparison would pass for a wrong one otherwise."""
    known = references()
    scale = np.abs(known["features_clean-fid"]).max()
    for other in ("pytorch-fid", "torch-fidelity"):
        assert np.abs(known["features_clean-fid"] - known[f"features_{other}"]).max() > 1e-2 * scale


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ModelFilesError, match=r"SHA-256 is [0-9a-f]{64}; expected pt_inception"):
        load_inception(tmp_path / "weights.pth")
    with pytest.raises(ModelFilesError, match="No such file"):
        load_inception(tmp_path / "none.pth")


def test_weights_of_another_shape_are_refused() -> None:
    weights = Inception().state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    assert inception_of(weights) is not None
    weights["Mixed_7c.branch1x1.conv.weight"] = torch.zeros(3, 3)
    with pytest.raises(ModelFilesError, match="size mismatch for Mixed_7c"):
        inception_of(weights)
