"""The noise that pictures start from: of a seed or a generator for each, or given."""

from collections.abc import Sequence

import torch
from torch import Tensor

# what a picture's noise comes from: a seed, a generator, the noise itself, torch's global generator
NoiseSource = int | torch.Generator | Tensor | None


def noise_sources(
    shape: tuple[int, ...],
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | None,
) -> Sequence[NoiseSource]:
    """Say for each picture where its noise comes from. shape: (B, C, h, w) of the noise of all pictures."""
    given = [
        name for name, value in (("seed", seed), ("generator", generator), ("latents", latents)) if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} were both given: give one of them")
    count = shape[0]
    if latents is not None:
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents {tuple(latents.shape)}: expected {shape}")
        return list(latents.float())
    if seed is None:
        if generator is None or isinstance(generator, torch.Generator):
            return [generator] * count
        if len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} pictures: give one, or one for each")
        return generator
    seeds = [int(one) for one in seed] if isinstance(seed, Sequence) else [int(seed) + i for i in range(count)]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} pictures: give one for each, or the first alone")
    if not all(0 <= one < 2**64 for one in seeds):
        raise ValueError(f"seed={seed}: expected 0 to 2^64 - 1")
    return seeds


def draw_noise(source: NoiseSource, shape: tuple[int, int, int]) -> Tensor:
    """Draw the starting noise of one picture, standard normal."""
    if isinstance(source, Tensor):
        return source
    if isinstance(source, int):
        source = torch.Generator().manual_seed(source)
    return torch.randn(shape, generator=source, device="cpu" if source is None else source.device)
