"""Compiled blocks beside plain ones.

The backend `eager` runs what was captured as it is: graph breaks and numbers of graphs show, in seconds. `inductor` is
the real one.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.registry import lookup_backend

from microdit.trainer.train import train
from tests.trainer.conftest import STAGE

STAGES = [
    STAGE | {"steps": 4, "mask_ratio": 0.5, "micro_batch": 6, "ema_half_life": [100, 20]},
    STAGE | {"steps": 4, "latents": "latents/demo-64", "ema_half_life": [100, 20], "ema_start": 32},
]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("eager", "fp32"),
        pytest.param("inductor", "fp32", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param("inductor", "bf16", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_compiled_blocks_train_as_plain_ones_in_few_graphs(
    recipe, tmp_path: Path, monkeypatch, name: str, precision: str
) -> None:
    torch._dynamo.reset()
    captured: Counter[int] = Counter()

    def backend(graph, inputs):
        captured[len(graph.graph.nodes)] += 1
        return lookup_backend(name)(graph, inputs)

    # fullgraph: a break in a block is an error
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    fields = {"stages": STAGES, "precision": precision, "checkpoint_every": 100}
    plain, compiled = (
        recipe(out=tmp_path / name, compile=name == "compiled", **fields) for name in ("plain", "compiled")
    )
    train(plain)
    assert not captured
    train(compiled)
    # three blocks; texts of four lengths, micro-batches of 6, 4 and 16, grids of 4, 2 and 16 tokens: 3 x 16 calls, and
    # what differs is captured once more as a symbol
    assert 3 <= captured.total() <= 3 * 6
    a, b = ([json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("plain", "compiled"))
    close = 1e-4 if precision == "fp32" else 2e-2
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in b] == pytest.approx([line[key] for line in a], rel=close)
    for file in ("model", "ema", "ema-2"):
        found, expected = (
            load_file(tmp_path / kind / "checkpoints" / "step-00000008" / f"{file}.safetensors")
            for kind in ("compiled", "plain")
        )
        for key in found:
            torch.testing.assert_close(found[key], expected[key], rtol=0.1, atol=1e-3, msg=f"{file} {key}")
