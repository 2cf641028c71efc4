"""Choose a device, and know if bfloat16 is fast on it."""

import torch


def best_device() -> str:
    """Choose `cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_fast_bf16(device: torch.device) -> bool:
    """Tell if bf16 is faster than float32: on every GPU, and on CPUs that multiply it (AMX, AVX-512 BF16: twice)."""
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
