"""MosaicML Streaming's part of benchmarks/loader.py, run by the Python of its own environment; imports nothing of ours.

python benchmarks/loader_streaming.py write TARS FOLDER | read FOLDER_OR_URL BATCH LENGTHS [DIGESTS]
"""

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Sample = tuple[str, np.ndarray, np.ndarray, str]  # key, latents, text, caption


def collate(samples: Sequence[Sample], lengths: Sequence[int]) -> tuple[list[str], Any, Any, Any, list[str]]:
    """Collate keys, latents, padded text and its mask as tensors, captions: the plain way."""
    keys, latents, texts, captions = zip(*samples, strict=True)
    longest = max(len(text) for text in texts)
    length = next(size for size in lengths if size >= longest)
    padded = np.zeros((len(texts), length, texts[0].shape[1]), dtype=texts[0].dtype)
    mask = np.zeros((len(texts), length), dtype=bool)
    for i, text in enumerate(texts):
        padded[i, : len(text)] = text
        mask[i, : len(text)] = True
    stacked, text, masked = (torch.from_numpy(array) for array in (np.stack(latents), padded, mask))
    return list(keys), stacked, text, masked, list(captions)


def digests(batch: tuple[list[str], Any, Any, Any, list[str]]) -> Iterator[str]:
    """Make a hash of everything about each sample."""
    for key, latents, text, mask, caption in zip(*batch, strict=True):
        parts = (key.encode(), latents.numpy().tobytes(), text[mask].numpy().tobytes(), caption.encode())
        yield hashlib.sha256(b"\0".join(parts)).hexdigest()


def drain(batches: Any, check: bool) -> dict[str, Any]:
    """Read all batches: seconds, processor seconds, samples; with `check` one hash over the samples in any order."""
    found: list[str] = []
    began, worked, count = time.perf_counter(), sum(os.times()[:4]), 0  # curl's, too
    for batch in batches:
        count += len(batch[0])
        if check:
            found += digests(batch)
    seconds, cpu = time.perf_counter() - began, sum(os.times()[:4]) - worked
    digest = hashlib.sha256("".join(sorted(found)).encode()).hexdigest() if check else None
    return {"seconds": seconds, "cpu": cpu, "samples": count, "digest": digest}


def batched(samples: Any, batch: int, lengths: Sequence[int]) -> Iterator[Any]:
    held: list[Sample] = []
    for sample in samples:
        held.append(sample)
        if len(held) == batch:
            yield collate(held, lengths)
            held = []
    if held:
        yield collate(held, lengths)


def write(tars: Path, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"key": "str", "latents": "ndarray:float16", "text": "ndarray:float16", "caption": "str"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 25) as writer:
        for path in sorted(tars.iterdir()):
            members: dict[str, bytes] = {}
            with tarfile.open(path) as tar:
                for info in tar:
                    file = tar.extractfile(info)
                    assert file is not None
                    key, _, extension = info.name.partition(".")
                    members[extension] = file.read()
                    if len(members) == 3:
                        latents, text = (np.load(io.BytesIO(members[f"{n}.npy"])) for n in ("latents", "text"))
                        caption = members["txt"].decode()
                        writer.write({"key": key, "latents": latents, "text": text, "caption": caption})
                        members = {}


def read(url: str, batch: int, lengths: Sequence[int], check: bool) -> dict[str, Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    local = tempfile.mkdtemp() if "://" in url else None
    where = {"remote": url, "local": local} if local else {"local": url}
    began = time.perf_counter()
    dataset = StreamingDataset(**where, shuffle=False, batch_size=batch)
    samples = ((s["key"], s["latents"], s["text"], s["caption"]) for s in dataset)
    found = drain(batched(samples, batch, lengths), check)
    found["opened"] = time.perf_counter() - began - found["seconds"]
    if local:
        shutil.rmtree(local)
    return found


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(json.dumps(read(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), "DIGESTS" in sys.argv)))
