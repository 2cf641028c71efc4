"""300 real pictures, from the files to the figures, against each of the tools (tests/data/evaluation/whole.json)."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from microdit.model.pretrained import inception
from microdit.pipeline.evaluation import features
from microdit.pipeline.evaluation.evaluate import EvaluationOptions, evaluate_pictures
from microdit.pipeline.evaluation.resizing import PROTOCOLS
from tests.pipeline.evaluation.references import DATA, random_inception


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_figures_of_folders_are_those_of_the_tool(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("make_pictures", DATA / "make_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, second = module.make_pictures(tmp_path)
    network: torch.nn.Module = random_inception()  # only the weights that everybody uses are taken from a file
    monkeypatch.setattr(features, "load_inception", lambda _: (network, inception.WEIGHTS))
    options = EvaluationOptions(["fid", "kid"], protocol=protocol, models={"inception": "random"}, device="cpu")
    found = evaluate_pictures(first, second, options)["metrics"]
    expected = json.loads((DATA / "whole.json").read_text())
    assert found["fid"]["value"] == pytest.approx(expected[f"fid {protocol}"], rel=1e-3)
    assert found["kid"]["value"] == pytest.approx(expected[f"kid {protocol}"], rel=1e-3)
