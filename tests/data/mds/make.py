"""Writes the folders beside it with MosaicML Streaming 0.13.0, which has to be installed for that (numpy < 2.2).

`python tests/data/mds/make.py` once; `samples` tells the tests what is in them.

- `official`: the columns and sizes of the official precompute, with images, packed, with hashes
- `workers`: plain, small arrays, several shards in one folder per worker, and the index that merges them
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CAPTIONS = [
    "a red apple on a table",
    "Zwei Käfer — größer als sonst",
    "snail\nand “quotes”",
    "夜のカエル 🐸",
    "&amp; x",
]
SIZES = {
    "official": {"caption_latents": (1, 77, 1024), "latents_256": (4, 32, 32), "latents_512": (4, 64, 64)},
    "workers": {"caption_latents": (1, 77, 8), "latents_64": (4, 8, 8), "latents_128": (4, 16, 16)},
}
COUNTS = {"official": [3], "workers": [5, 3]}  # samples of each worker


def array(seed: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float16 numbers of a few values, rows of which repeat, so that a large array packs well."""
    rows, length = int(np.prod(shape[:-1])), shape[-1]
    digest = np.frombuffer(hashlib.shake_256(seed.encode()).digest(8 * length), np.uint8).reshape(8, length)
    values = (digest.astype(np.float16) - 128) / 32
    which = np.frombuffer(hashlib.shake_256(f"{seed} rows".encode()).digest(rows), np.uint8) % 8
    return values[which].reshape(shape)


def jpeg(seed: str) -> bytes:
    from PIL import Image

    corners = np.frombuffer(hashlib.sha256(seed.encode()).digest()[:12], np.uint8).reshape(2, 2, 3)
    buffer = io.BytesIO()
    Image.fromarray(corners).resize((96, 64), Image.Resampling.BILINEAR).save(buffer, "JPEG")
    return buffer.getvalue()


def samples(kind: str, worker: int) -> Iterator[dict[str, object]]:
    """The samples of a worker: caption (str), arrays (float16); no images, whose bytes hang on Pillow's version."""
    for i in range(COUNTS[kind][worker]):
        seed = f"{kind} {worker} {i}"
        arrays = {name: array(f"{seed} {name}", shape) for name, shape in SIZES[kind].items()}
        yield {"caption": f"{CAPTIONS[i % len(CAPTIONS)]} ({seed})", **arrays}


def encoded(sample: dict[str, object]) -> dict[str, bytes]:
    """The bytes of each column."""
    return {name: v.encode() if isinstance(v, str) else v.tobytes() for name, v in sample.items()}  # type: ignore[attr-defined]


def write(kind: str) -> None:
    from streaming import MDSWriter
    from streaming.base.util import merge_index

    columns = {"caption": "str", **dict.fromkeys(SIZES[kind], "bytes")}
    packed = kind == "official"
    for worker in range(len(COUNTS[kind])):
        out = HERE / kind if packed else HERE / kind / str(worker)
        options = (
            {"compression": "zstd", "hashes": ["sha1", "xxh64"], "size_limit": 256 << 20}
            if packed
            else {"size_limit": 10_000}
        )
        with MDSWriter(out=str(out), columns=columns | ({"jpg": "jpeg"} if packed else {}), **options) as writer:
            for i, sample in enumerate(samples(kind, worker)):
                images = {"jpg": jpeg(f"{kind} {worker} {i}")} if packed else {}
                writer.write({**sample, **encoded({k: v for k, v in sample.items() if k != "caption"}), **images})
    if not packed:
        merge_index(str(HERE / kind), keep_local=True)


def read(folder: str) -> None:
    """Print what the library reads of a folder: for each sample the SHA-256 of the bytes of each column."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=folder, shuffle=False, batch_size=1)
    for i in range(len(dataset)):
        item = dataset[i]
        values = {k: v.encode() if isinstance(v, str) else v for k, v in item.items() if isinstance(v, str | bytes)}
        print(json.dumps({name: hashlib.sha256(value).hexdigest() for name, value in sorted(values.items())}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        read(sys.argv[1])
    else:
        for name in SIZES:
            write(name)
