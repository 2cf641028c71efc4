"""The precision that suits a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from microdit.model.device import has_fast_bf16

PROGRAM = "import torch; from microdit.model.device import has_fast_bf16; print(has_fast_bf16(torch.device('cpu')))"


def test_a_cpu_that_is_held_to_avx2_takes_float32() -> None:
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the CPU has no AVX-512")
def test_others_take_bf16_if_they_multiply_it() -> None:
    multiplied = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert has_fast_bf16(torch.device("cpu")) == multiplied
