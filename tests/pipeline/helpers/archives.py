"""Small tars and zips in memory, and how tests read them."""

import bz2
import gzip
import io
import lzma
import random
import resource
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from microdit.pipeline.files.archives import members
from microdit.pipeline.files.tars import Member

MOST = 1 << 20


def every(name: str) -> bool:
    return True


def made_tar(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def made_zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "tar": lambda data: data,
    "gz": gzip.compress,
    "gz in two": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]) + bytes(100),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}


FILES = {f"a/{i:03d}.jpg": random.Random(i).randbytes(700 * i) for i in range(12)}


def read(path: Path, data: bytes, wanted: Callable[[str], bool] = every, most: int = MOST) -> list[Member]:
    path.write_bytes(data)
    return list(members(path, wanted, most))


def good(found: list[Member]) -> dict[str, bytes]:
    return {member.name: member.data for member in found if member.data is not None}


def bounded(path: Path, most: int = MOST) -> list[Member]:
    """The members, read within some seconds and without the memory growing much."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(members(path, every, most))
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    return found
