"""Real photographs with damaged scans, and sound pictures of many sorts, through ingest.

    python -m benchmarks.damage_photographs [--count 2000] [--sound 3200] [--seed N] [--packages FOLDER] [--json]

Parts of the photographs that some packages carry, turned and resized, as JPEGs of 13 kinds, damaged: 1 to 8,192 bytes
are inserted, repeated or zeroed, or a bit is turned over. `accepted_wrong`: accepted with more than a tenth of the
pixels wrong. Goal: under 1%. `sound_refused` counts those that are refused of sound pictures: photographs, and drawn
ones that look most like damage (benchmarks/sound_pictures.py), a fifth with a camera's padding. Goal: 0. Photographs
are looked for where Python looks for packages and in FOLDER; the figures of benchmarks/LOG.md are with those of

    pip install --no-deps --target FOLDER scikit-image matplotlib ultralytics insightface gradio scikit-learn
"""

import io
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.damage_scans import WAYS, stored, wrong_share
from benchmarks.harness import argument_parser, print_figures
from benchmarks.sound_pictures import SORTS
from microdit.pipeline.content.images import BadImage
from microdit.pipeline.content.jpeg import read_segments

FILES = {
    "sklearn/datasets/images": ["china.jpg", "flower.jpg"],
    "skimage/data": [
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
        *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg"),
        "rocket.jpg",
    ],
    "matplotlib/mpl-data/sample_data": ["grace_hopper.jpg"],
    "ultralytics/assets": ["bus.jpg", "zidane.jpg"],
    "insightface/data/images": ["mask_white.jpg", "t1.jpg"],
    "gradio/media_assets/images": ["cheetah.jpg", "groot.jpeg", "tower.jpg"],
    "gradio/test_data": ["cheetah2.jpg"],
}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("RGB", {"quality": 30}),
    ("RGB", {"quality": 60, "optimize": True}),
    ("RGB", {"quality": 75}),
    ("RGB", {"quality": 85}),
    ("RGB", {"quality": 85, "optimize": True}),
    ("RGB", {"quality": 85, "subsampling": 1}),
    ("RGB", {"quality": 85, "progressive": True}),
    ("RGB", {"quality": 85, "restart_marker_rows": 1}),
    ("RGB", {"quality": 85, "restart_marker_blocks": 300}),
    ("RGB", {"quality": 92}),
    ("RGB", {"quality": 95, "subsampling": 0}),
    ("L", {"quality": 85}),
    ("CMYK", {"quality": 85}),
]
SOUND_KINDS = [*KINDS, ("RGB", {"quality": 10}), ("RGB", {"quality": 100, "subsampling": 0}), ("L", {"quality": 40})]
WAYS_HERE = ("insert", "repeat", "flip", "zero")  # by which a scan finds its place again most often
LENGTHS = (1, 2, 16, 64, 200, 512, 4096, 8192)


@cache
def photographs(packages: str | None) -> list[Image.Image]:
    """Read all photographs of `FILES` that are found, each once."""
    folders = [*([packages] if packages else []), *sys.path]
    paths = [Path(folder) / name for folder, names in FILES.items() for name in names]
    found = (next((Path(root, path) for root in folders if Path(root, path).is_file()), None) for path in paths)
    return [Image.open(path).convert("RGB") for path in found if path is not None]


def part(rng: random.Random, packages: str | None) -> Image.Image:
    """Make a part of a photograph, some of them resized, turned or mirrored."""
    image = rng.choice(photographs(packages))
    across, down = (min(rng.randrange(224, 900), side) for side in image.size)
    x, y = rng.randrange(image.width - across + 1), rng.randrange(image.height - down + 1)
    image = image.crop((x, y, x + across, y + down))
    if rng.random() < 0.5:
        factor = rng.uniform(0.6, 1.5)
        size = (max(200, int(across * factor)), max(200, int(down * factor)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image.transpose(rng.choice(list(Image.Transpose))) if rng.random() < 0.5 else image


def encoded(image: Image.Image, rng: random.Random, kinds: list[tuple[str, dict[str, Any]]]) -> bytes:
    mode, options = rng.choice(kinds)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def damaged_photograph(seed: int, number: int, packages: str | None) -> tuple[str, bytes, bytes]:
    """Damage one scan: return the kind of damage, the damaged file and the whole one."""
    rng = random.Random(f"{seed}/photograph/{number}")
    whole = encoded(part(rng, packages), rng, KINDS)
    begin = read_segments(whole).begin
    begin += 2 + int.from_bytes(whole[begin + 2 : begin + 4], "big")
    data, way = bytearray(whole), rng.choice(WAYS_HERE)
    WAYS[way](data, rng.randrange(begin, len(data) - 2), rng.choice(LENGTHS), rng, b"")
    return way, bytes(data), whole


def sound_picture(seed: int, number: int, packages: str | None) -> tuple[str, bytes]:
    """Make one sound JPEG, and return the name of its sort too."""
    rng = random.Random(f"{seed}/sound/{number}")
    sort = SORTS[number % len(SORTS)]
    data = encoded(sort(rng, lambda rng: part(rng, packages)), rng, SOUND_KINDS)
    if rng.random() < 0.2:
        padding = rng.choice(
            [rng.randbytes(rng.randrange(1, 5)).replace(b"\xff", b"\0"), bytes(rng.randrange(1, 5000))]
        )
        data = data[:-2] + padding + data[-2:]
    return sort.__name__, data


def measure(count: int, sound: int, seed: int, packages: str | None) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for number in range(count):
        way, data, whole = damaged_photograph(seed, number, packages)
        try:
            found = stored(data)
        except BadImage as error:
            outcomes[error.reason] += 1
            continue
        outcomes["ok"] += 1
        if data != whole and wrong_share(found, stored(whole)) > 0.1:
            wrong[way] += 1
    refused: Counter[str] = Counter()
    for number in range(sound):
        sort, data = sound_picture(seed, number, packages)
        try:
            stored(data)
        except BadImage as error:
            refused[f"{sort} {number}: {error}"] += 1
    return {
        "seed": seed,
        "photographs": len(photographs(packages)),
        "damaged": count,
        "outcomes": dict(outcomes.most_common()),
        "accepted_wrong": wrong.total(),
        "accepted_wrong_share": round(wrong.total() / max(count, 1), 4),
        "accepted_wrong_by_damage": dict(wrong.most_common()),
        "sound": sound,
        "sound_refused": refused.total(),
        "sound_refused_items": list(refused),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=2000, help="damaged photographs")
    parser.add_argument("--sound", type=int, default=3200, help="sound pictures")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time; it is printed")
    parser.add_argument("--packages", default=None, metavar="FOLDER", help="where packages with photographs are, too")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    found = measure(options.count, options.sound, seed, options.packages)
    print_figures(found, options.json)
    if found["sound_refused"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
