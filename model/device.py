"""Choose a device, and know if bfloat16 is fast on it."""

import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def best_device() -> str:
    """Choose `cuda` if there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_fast_bf16(device: "torch.device") -> bool:
    """Tell if bf16 is faster than float32: on every GPU, and on CPUs that multiply it (AMX, AVX-512 BF16: twice).

    Not where torch is held to AVX2 (`ATEN_CPU_CAPABILITY`), whatever the CPU could do: it is eight times slower then.
    """
    import torch

    if device.type == "cuda":
        return True
    multiplied = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return multiplied and torch.backends.cpu.get_cpu_capability() == "AVX512"


def peak_memory_mb(device: "torch.device") -> int:
    """Return the most that this process has held so far: of the GPU, or of the machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
