"""Runs with `optimizer: { name: muon }`: they learn, go on exactly, and refuse what cannot be."""

from pathlib import Path

import pytest
import torch

from microdit.pipeline.base.errors import RequestError
from microdit.trainer.train import train
from tests.trainer.conftest import STAGE, losses, tensors

MUON = {"optimizer": {"name": "muon", "clip": 1.0}}


def test_it_learns_and_goes_on_exactly(recipe, tmp_path: Path) -> None:
    stage = STAGE | {"learning_rate": 3e-3}
    train(recipe(stages=[stage | {"steps": 40}], out=str(tmp_path / "whole"), log_every=10, **MUON))
    found = losses(tmp_path / "whole")
    assert found[40] < 0.97 * found[10]
    for steps in (17, 40):
        train(recipe(stages=[stage | {"steps": steps}], out=str(tmp_path / "parts"), log_every=10, **MUON))
    for file in ("model", "optimizer"):
        a, b = (tensors(tmp_path / out, 40, file) for out in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.endswith("momentum_buffer") for name in a) and any(name.endswith("exp_avg") for name in a)


def test_a_run_keeps_its_optimizer_and_fsdp_is_refused(recipe, tmp_path: Path) -> None:
    train(recipe(stages=[STAGE | {"steps": 1}]))
    with pytest.raises(RequestError, match=r"optimizer\.name = adamw, the recipe says muon"):
        train(recipe(stages=[STAGE | {"steps": 2}], **MUON))
    with pytest.raises(ValueError, match="muon needs whole matrices"):
        recipe(parallel="fsdp", **MUON)
