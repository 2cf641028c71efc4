"""Encode numpy arrays as `.npy` and `.npz` bytes, and read them back without unpickling."""

import io
import math
import struct
import threading
import zipfile
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from microdit.pipeline.corpus.quantised import Quantised, dequantise

ZIP_MEMBER = b"PK\3\4"
MOST_HEADER = 10_012  # bytes: numpy itself reads no `.npy` header longer than 10,000
_parser = threading.Lock()  # Python 3.11's parser counts its depth wrongly when threads take turns in it


def array_bytes(array: np.ndarray) -> bytes:
    """Encode an array as a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def arrays_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Encode arrays as a `.npz` file, not compressed; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), array_bytes(array))
    return buffer.getvalue()


def array_from_bytes(data: bytes) -> np.ndarray:
    """Decode any field of a sample: a `.npy` file as it is, a `.npz` file (quantised text) as float16.

    Never unpickles, and allocates no more than a few times the file's length.

    Raises:
        ValueError: this is no such file, or its headers and its length disagree.
    """
    view = memoryview(data)
    return dequantise(_npz_arrays(view)) if view[:4] == ZIP_MEMBER else _npy_array(view).copy()


def array_view(data: memoryview) -> np.ndarray | Quantised:
    """Decode as `array_from_bytes`, without a copy: the array, or the parts of quantised text, lie in `data`."""
    return Quantised.of(_npz_arrays(data)) if data[:4] == ZIP_MEMBER else _npy_array(data)


def _npz_arrays(data: memoryview) -> dict[str, np.ndarray]:
    """Decode a zip of `.npy` files, as `arrays_bytes` writes it: stored one after the other."""
    arrays, at = {}, 0
    while data[at : at + 4] == ZIP_MEMBER and at + 30 <= len(data):
        flags, method, size, full, name, extra = struct.unpack_from("<2H8x2I2H", data, at + 6)
        start = at + 30 + name + extra
        if flags & 9 or method or size != full or start + size > len(data):
            raise ValueError(f"npz: the member at {at} is not stored plainly, or is cut")
        member = bytes(data[at + 30 : at + 30 + name]).decode("ascii", "replace").removesuffix(".npy")
        arrays[member] = _npy_array(data[start : start + size])
        at = start + size
    return arrays


def _npy_array(data: memoryview) -> np.ndarray:
    """Decode a `.npy` file without a copy."""
    start = 12 if data[6:8] == b"\x02\x00" else 10
    start += int.from_bytes(data[8:start], "little")
    shape, fortran_order, dtype = _array_header(bytes(data[: min(start, MOST_HEADER)]))
    length = len(data) - start
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != length:
        raise ValueError(f"npy: {length} bytes behind a header that says {dtype} {shape}")
    array = np.frombuffer(data, dtype, offset=start) if length else np.empty(0, dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


@lru_cache(maxsize=256)  # a shard has few different headers
def _array_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parse shape, order and dtype from the header of a `.npy` file."""
    buffer = io.BytesIO(header)
    try:
        with _parser:
            version = np.lib.format.read_magic(buffer)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            return read(buffer)
    except Exception as error:  # numpy lets through whatever Python's parser and tokenizer raise
        raise ValueError(f"npy: its header cannot be read: {error}") from error
