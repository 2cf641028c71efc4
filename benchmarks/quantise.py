"""Measure size and error of a text column in float16, int8 and int4: against float16 padded to the encoder's length.

    python benchmarks/quantise.py [--captions 500] [--json]

`minilm`: real embeddings, of the long captions of OpenMoji's drawings, padded to its 128 tokens. `dfn-clip-h` and
`t5-xxl`: their shapes, random numbers for captions of 40 tokens, a few channels 40 times as large as the others, which
is how T5's look; random numbers are the hardest to quantise, so that the loss is an upper bound. Bytes are those of
the tar, headers and filling counted. `less`: how many times fewer bytes than padded float16; `read`: samples a second
that one thread turns back into float16.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.harness import argument_parser
from microdit.model.pretrained.text import load_text_encoder
from microdit.pipeline.corpus.arrays import array_bytes, array_from_bytes, arrays_bytes
from microdit.pipeline.corpus.quantised import Loss, Storage, quantise
from microdit.pipeline.sources.openmoji.drawings import catalogue
from microdit.pipeline.sources.openmoji.server import long_caption

GOALS = {("dfn-clip-h", "int8"): 3.5, ("t5-xxl", "int8"): 5.8, ("t5-xxl", "int4"): 9.0}
PADDED = {"minilm": 128, "dfn-clip-h": 77, "t5-xxl": 120}
TOKENS = 40
OUTLIERS, LARGER = 4, 40.0


def minilm(count: int) -> list[np.ndarray]:
    encoder = load_text_encoder("minilm")
    captions = [long_caption(drawing) for drawing in catalogue()[:count]]
    found = []
    for start in range(0, len(captions), 32):
        embeddings, lengths = encoder.encode(captions[start : start + 32])
        found += [e[:n].numpy() for e, n in zip(embeddings, lengths.tolist(), strict=True)]
    return found


def drawn(width: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    scales = np.ones(width, np.float32)
    scales[rng.choice(width, OUTLIERS, replace=False)] = LARGER
    return [rng.standard_normal((TOKENS, width), np.float32) * scales for _ in range(count)]


def in_tar(data: bytes) -> int:
    return 512 + -(-len(data) // 512) * 512


def rows(name: str, embeddings: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    padded = in_tar(array_bytes(np.zeros((PADDED[name], embeddings[0].shape[1]), np.float16)))
    storages: tuple[Storage | None, ...] = (None, "int8", "int4")
    for storage in storages:
        stored = []
        for embedding in embeddings:
            if storage is None:
                stored.append(array_bytes(embedding.astype(np.float16)))
            else:
                arrays = quantise(torch.from_numpy(embedding), storage)
                stored.append(arrays_bytes({k: tensor.numpy() for k, tensor in arrays.items()}))
        began = time.perf_counter()
        again = [array_from_bytes(data) for data in stored]
        seconds = time.perf_counter() - began
        loss = Loss.none()
        worst = max(loss.compare(e, a) for e, a in zip(embeddings, again, strict=True))
        size = sum(map(in_tar, stored)) / len(stored)
        yield {
            "encoder": name,
            "storage": storage or "float16",
            "tokens": round(sum(map(len, embeddings)) / len(embeddings), 1),
            "bytes": round(size),
            "less": round(padded / size, 2),
            "goal": GOALS.get((name, storage or "")),
            "worst_sample": round(worst, 5),
            "read": round(len(stored) / seconds),
            **{key: round(value, 6) for key, value in loss.figures().items()},
        }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--captions", type=int, default=500)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    embeddings = {"minilm": minilm(asked.captions)}
    embeddings |= {name: drawn(width, asked.captions // 10) for name, width in (("dfn-clip-h", 1024), ("t5-xxl", 4096))}
    found = [row for name, samples in embeddings.items() for row in rows(name, samples)]
    if asked.json:
        print(json.dumps({"rows": found}))
        return
    print("encoder      storage    bytes   less  goal  mean cosine     worst  mean error     worst  samples/s read")
    for row in found:
        print(
            f"{row['encoder']:12} {row['storage']:8} {row['bytes']:7,} {row['less']:5.2f}x {row['goal'] or '':>5} "
            f"{row['cosine_mean']:12.6f} {row['cosine_worst']:9.6f} {row['error_mean']:11.5f} "
            f"{row['error_worst']:9.5f} {row['read']:15,}"
        )


if __name__ == "__main__":
    main()
