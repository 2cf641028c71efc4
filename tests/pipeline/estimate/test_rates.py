"""Shapes and rates of models and machines."""

import pytest

from microdit.model.pretrained.autoencoder import AUTOENCODERS, autoencoder_fingerprint
from microdit.model.pretrained.text_registry import TEXT_ENCODERS
from microdit.pipeline.estimate import rates


def test_shapes_are_those_of_the_models() -> None:
    assert rates.AUTOENCODERS.keys() == AUTOENCODERS.keys() and rates.ENCODERS.keys() == TEXT_ENCODERS.keys()
    for name, encoder in rates.ENCODERS.items():
        if (most := TEXT_ENCODERS[name].max_tokens) is not None:
            assert encoder.tokens == most
    assert autoencoder_fingerprint("demo")["normaliser"] and rates.AUTOENCODERS["demo"] == (4, 8)
    assert all(rate.rate > 0 and rate.command and rate.date for rate in rates.table())
    assert all(rate.device in {rates.CPU, *rates.GPUS} for rate in rates.table())


@pytest.mark.parametrize(
    ("device", "kind", "same"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", True),
        ("NVIDIA H100 80GB HBM3", "h200", False),
        ("NVIDIA A100-SXM4-80GB", "a100", True),
        ("NVIDIA L40S", "l40s", True),
        ("NVIDIA L40S", "l4", False),
        ("NVIDIA GeForce RTX 4090", "rtx4090", True),
        ("cpu", "h100", False),
    ],
)
def test_a_devices_name_tells_its_kind(device: str, kind: str, same: bool) -> None:
    assert rates.is_kind(device, kind) is same
