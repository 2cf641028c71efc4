"""Latents made on a GPU. Imports little: benchmarks.gpu runs it where few packages are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from microdit.pipeline.corpus.corpus import Corpus
from microdit.pipeline.stages import latents as latents_stage
from tests.pipeline.helpers.small_latents import arrays, columns, one, run, stage_of, start

__all__ = ["one"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives(one: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Within 2% of the largest number of an image: bfloat16 has three digits. Made again, the same bytes."""
    asked = columns(a=(one, 64), moments=(one, 32, "moments"))
    found = []
    for name in ("gpu", "again", "cpu"):
        root = start(tmp_path / name)
        if name == "cpu":
            monkeypatch.setattr(latents_stage, "best_device", lambda: "cpu")
        stage = stage_of(root, asked)
        assert {model.device.type for model in stage.models.values()} == {"cpu" if name == "cpu" else "cuda"}
        found.append(run(stage, root))
        assert all(commit.timings["encode_seconds"] > 0 for commit in found[-1].values())
    for column in asked:
        assert found[0][column].object.sha256 == found[1][column].object.sha256
        gpu, cpu = arrays(Corpus.open(tmp_path / "gpu"), found[0][column]), arrays(root, found[2][column])
        assert gpu.keys() == cpu.keys()
        for key, latent in gpu.items():
            assert np.abs(latent.astype(np.float32) - cpu[key]).max() <= 0.02 * np.abs(cpu[key]).max()
