"""Fetch the prompt lists and statistics that people compare with, by name: once, checked by hash, into the cache.

    geneval            553 prompts with what is judged; MIT
    partiprompts       1,632 prompts; Apache-2.0
    dpg-bench          1,065 long prompts, with questions; Apache-2.0
    coco-30k-boomb0om  30,000 captions of COCO 2014 val, and mean and covariance of Inception's features of the pictures

Where no hash has been published, that of the first use is kept beside the file, and any other is refused from then on.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import requests

from microdit.pipeline.base.digest import sha256_file
from microdit.pipeline.base.errors import RequestError, first_line

GITHUB = "https://raw.githubusercontent.com"
BOOMB0OM = "https://github.com/boomb0om/text2image-benchmark/releases/download/v0.0.1"
MOST_BYTES = 256 << 20  # of a file
TRIES, CONNECT_SECONDS, READ_SECONDS = 3, 10.0, 60.0
CHUNK = 1 << 20


@dataclass(frozen=True)
class NamedFile:
    """A file of the web. `sha256` is None where none is known; `blob` is git's hash of it."""

    url: str
    file: str
    sha256: str | None = None
    blob: str | None = None


PROMPTS = {
    "geneval": NamedFile(
        f"{GITHUB}/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/evaluation_metadata.jsonl",
        "evaluation_metadata.jsonl",
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    ),
    "partiprompts": NamedFile(
        f"{GITHUB}/google-research/parti/5a657978134374ce28973948331b319adef164bd/PartiPrompts.tsv",
        "PartiPrompts.tsv",
        "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
    ),
    "dpg-bench": NamedFile(
        f"{GITHUB}/TencentQQGYLab/ELLA/3c228f1dc6c4d3cad0a47493816151a419f14db3/dpg_bench/dpg_bench.csv",
        "dpg_bench.csv",
        blob="98457fc9901943f51ff9a30367250fc292533bed",
    ),
    "coco-30k-boomb0om": NamedFile(f"{BOOMB0OM}/MS-COCO_val2014_30k_captions.csv", "MS-COCO_val2014_30k_captions.csv"),
}
STATISTICS = {
    "coco-30k-boomb0om": NamedFile(f"{BOOMB0OM}/MS-COCO_val2014_fid_stats.npz", "MS-COCO_val2014_fid_stats.npz")
}


def cache_folder() -> Path:
    """Return `microdit/evaluation` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "microdit" / "evaluation"


def named_file(name: str, known: NamedFile) -> Path:
    """Return the path of a named file in the cache, fetched if it is not there.

    Raises:
        RequestError: it cannot be had, or its hash is another one.
    """
    path = cache_folder() / known.file
    noted = path.with_name(f"{path.name}.sha256")
    if path.exists():
        expected = noted.read_text().strip() if noted.exists() else ""
        if sha256_file(path) == expected:
            return path
        path.unlink()  # half of it, of a process that was stopped, or another one
    data = _fetch(name, known.url)
    sha256, blob = hashlib.sha256(data).hexdigest(), _blob(data)
    before = noted.read_text().strip() if noted.exists() else None
    for wanted, found in ((known.sha256, sha256), (known.blob, blob), (before, sha256)):
        if wanted is not None and found != wanted:
            raise RequestError(
                f"{name}: {known.url} is another file than it was: its hash is {found}, expected {wanted}; give the "
                "right one by its path"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    noted.write_text(f"{sha256}\n")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)
    return path


def _fetch(name: str, url: str) -> bytes:
    """Fetch a file whole, with a few tries."""
    failure = ""
    for _ in range(TRIES):
        try:
            with requests.get(url, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as answer:
                answer.raise_for_status()
                data = bytearray()
                for chunk in answer.iter_content(CHUNK):
                    data += chunk
                    if len(data) > MOST_BYTES:
                        raise RequestError(f"{name}: {url} has more than {MOST_BYTES:,} bytes; give a file by its path")
                return bytes(data)
        except requests.RequestException as error:
            failure = first_line(error)
    raise RequestError(
        f"{name}: {url} cannot be fetched ({failure}); check the connection, or download it elsewhere and give its path"
    )


def _blob(data: bytes) -> str:
    """Compute git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
