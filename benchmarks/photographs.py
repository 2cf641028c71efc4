"""Drawn pictures with about the statistics of photographs, which benchmarks encode, caption, damage and compare."""

import io
import random

import numpy as np
from PIL import Image, ImageDraw

GRAINS = (2, 4, 8, 16, 32, 64, 128)  # pixels


def photograph(rng: random.Random) -> bytes:
    """Make a JPEG with about the statistics of one: as strong in every octave, edges, and a little noise."""
    width, height = (rng.randrange(300, 1501) for _ in range(2))
    numbers = np.random.default_rng(rng.getrandbits(32))
    pixels = np.full((height, width, 3), 128.0, np.float32)
    for grain in GRAINS:
        small = numbers.normal(0, 14, (height // grain + 2, width // grain + 2)).astype(np.float32)
        rough = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
        pixels += rough[..., None] * np.array([rng.uniform(0.5, 1.2) for _ in range(3)], np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, across = rng.randrange(width), rng.randrange(height), rng.randrange(10, 200)
        colour = tuple(rng.randrange(256) for _ in range(3))
        rng.choice([draw.ellipse, draw.rectangle])((x, y, x + across, y + across // 2 + 5), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.choice([75, 85, 90, 95]))
    return buffer.getvalue()
